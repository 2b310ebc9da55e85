"""The base of all sections: frozen, strict about types and keys, all problems reported at once."""

import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from megatron_sgt import extensions
from megatron_sgt.paths import expand

SECTION_PROBLEMS = "section_problems"
"""Error type of a section's own rules; its message holds one `field: text` line per broken rule."""


MOST_INTEGER = 2**31 - 1
MOST_NUMBER = 1e30
"""Bounds of every setting that names no other: 32-bit integers, and what fp32 holds."""
MOST_TOKENS = 10**18
"""More than any run has."""
MOST_SEED = 2**63 - 1
"""Seeds are 64-bit integers of torch, and every rank adds a little to them."""
MOST_SECONDS, MOST_MINUTES = 1e8, 1e6
"""What timers and the collectives' timeouts hold, with room to spare."""

EXPAND = "expand"
"""Key of the validation context: how paths are filled in, a function of text; ``paths.expand`` unless given."""

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def shown(value: Any) -> str:
    """Return a value as shown in messages: short, with true, false and null as in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return _repr.repr(_as_typed(value))


def _as_typed(value: Any) -> Any:
    """Tuples, of which YAML has none, as the lists that they were."""
    return [_as_typed(entry) for entry in value] if isinstance(value, tuple) else value


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

    @field_validator("*", mode="after")
    @classmethod
    def _within_bounds(cls, value: Any, info: ValidationInfo) -> Any:
        metadata = cls.model_fields[info.field_name or ""].metadata
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, bool) or not isinstance(item, int | float):
                continue
            most = MOST_INTEGER if isinstance(item, int) else MOST_NUMBER
            if item > most and not any(hasattr(bound, "le") for bound in metadata):
                raise PydanticKnownError("less_than_equal", {"le": most})
            if item < -most:
                raise PydanticKnownError("greater_than_equal", {"ge": -most})
        return value

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


@dataclass(frozen=True)
class PathSetting:
    """Annotates a setting that is a path: it is filled in, or refused, when the section is validated."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self._fill_in, handler(source))

    @staticmethod
    def _fill_in(text: str, info: ValidationInfo) -> str:
        how: Callable[[str], str] = (info.context or {}).get(EXPAND, expand)
        return how(text)


PathText: TypeAlias = Annotated[str, PathSetting()]
"""Type of every setting that is a path."""


def is_path(annotation: Any, metadata: Iterable[Any] = ()) -> bool:
    """Whether a setting of this annotation, with what pydantic has split off from it, holds paths."""
    if any(isinstance(item, PathSetting) for item in metadata):
        return True
    return any(is_path(part, getattr(part, "__metadata__", ())) for part in get_args(annotation) if part is not str)


def derived(description: str, **constraints: Any) -> Any:
    """Return a field whose null a validator of its section replaces with a value of the other fields."""
    return Field(default=None, validate_default=True, description=description, **constraints)
