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
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "int_type": "must be an integer",
    "less_than": "must be < {lt:g}",
    "less_than_equal": "must be <= {le:g}",
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
        requirement = _REQUIREMENTS.get(kind, item["msg"]).format(**context)
        yield f"{where}: {requirement}, got {shown(item['input'])}{_choice_hint(item['input'], context)}"


def _choice_hint(value: Any, context: dict[str, Any]) -> str:
    choices = re.findall(r"'([^']*)'", context.get("expected", ""))
    close = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    return f"; did you mean '{close[0]}'?" if close else ""


def _dotted(loc: tuple[str | int, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")
