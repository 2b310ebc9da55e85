"""The base of all sections: frozen, strict about types and keys, all problems reported at once."""

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, field_validator, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from megatron_sgt import extensions

SECTION_PROBLEMS = "section_problems"
"""Error type of a section's own rules; its message holds one `field: text` line per broken rule."""


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def shown(value: Any) -> str:
    """Return a value as shown in messages: short, with true, false and null as in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return _repr.repr(list(value) if isinstance(value, tuple) else value)


def count(number: int, noun: str) -> str:
    """Return 1 layer, 2 layers."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


class Section(BaseModel):
    """One section of the configuration. Values never change after validation.

    Types are strict (``"8"``, ``8.0`` and ``true`` are not integers), so that mistakes are refused, not guessed at. A
    list is accepted as a tuple, since YAML has no tuples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_rules(self) -> "Section":
        problems = list(self.problems())
        if problems:
            raise PydanticCustomError(SECTION_PROBLEMS, "{lines}", {"lines": "\n".join(problems)})
        return self

    def problems(self) -> Iterator[str]:
        """Yield one ``field: text`` line for each broken rule that concerns more than one field."""
        yield from ()


def section_class(annotation: Any) -> type[BaseModel] | None:
    """Return the section's class in an annotation such as ``Section`` or ``Section | None``; else None."""
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


@dataclass(frozen=True)
class Choice:
    """Annotates a text setting: one of the ``built_in`` names, or one registered in ``group`` (extensions.py)."""

    group: str
    built_in: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        if name not in self.built_in and name not in (registered := extensions.names(self.group)):
            *others, last = (f"'{known}'" for known in (*self.built_in, *registered))
            expected = f"{', '.join(others)} or {last}" if others else last
            raise PydanticKnownError("literal_error", {"expected": expected})
        return name


def derived(description: str, **constraints: Any) -> Any:
    """Return a field whose null a validator of its section replaces with a value of the other fields."""
    return Field(default=None, validate_default=True, description=description, **constraints)
