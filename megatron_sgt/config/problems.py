"""Turns each of pydantic's errors into one line in the user's terms: where, what must hold, what was given."""

import difflib
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_sgt.config.base import SECTION_PROBLEMS, shown
from megatron_sgt.config.hints import unknown_key

_REQUIREMENTS = {
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "int_type": "must be an integer",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "literal_error": "must be {expected}",
    "model_type": "must be a mapping",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "tuple_type": "must be a list",
}


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Return one line per problem of a validation of ``root``, in the order of the fields."""
    return [line for item in error.errors(include_url=False) for line in _lines(dict(item), root)]


def _lines(item: dict[str, Any], root: type[BaseModel]) -> Iterator[str]:
    kind, loc, context = item["type"], item["loc"], item.get("ctx", {})
    where = _dotted(loc)
    if kind == "extra_forbidden":
        yield unknown_key(root, tuple(map(str, loc)))
    elif kind == "missing":
        yield f"{where}: is required"
    elif kind == SECTION_PROBLEMS:
        yield from (f"{where}.{line}" if where else line for line in context["lines"].splitlines())
    elif kind == "value_error":
        yield f"{where}: {context['error']}"
    else:
        bounds = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
        requirement = _REQUIREMENTS.get(kind, item["msg"]).format(**bounds)
        yield f"{where}: {requirement}, got {shown(item['input'])}{_hint(item['input'], kind, context)}"


def _hint(value: Any, kind: str, context: dict[str, Any]) -> str:
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}" if abs(value) < 1e15 else ""
    if kind == "string_type" and isinstance(value, int | float):
        return "; put it into quotes" if not isinstance(value, bool) else ""
    choices = re.findall(r"'([^']*)'", context.get("expected", ""))
    close = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    return f"; did you mean '{close[0]}'?" if close else ""


def _dotted(loc: tuple[str | int, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")
