"""What all sections share: strict types, known keys, no change after validation, a description per field."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from megatron_sgt import extensions
from megatron_sgt.config import Config, GrowthConfig, OptimConfig
from megatron_sgt.config.base import SECTION_PROBLEMS, Section, count, derived, shown
from megatron_sgt.config.hints import section_at

SECTIONS: list[type[BaseModel]] = [
    Config,
    *(s for name in Config.model_fields if (s := section_at(Config, (name,)))),
]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), (3, "3"), ("a", "'a'"), ((1, 2), "[1, 2]"), ({"a": 1}, "{'a': 1}")],
)
def test_shown(value: Any, text: str) -> None:
    assert shown(value) == text


def test_shown_is_short() -> None:
    assert len(shown("x" * 1000)) <= 80


@pytest.mark.parametrize(
    "given",
    [
        {"window_size": "10"},
        {"window_size": 10.0},
        {"window_size": True},
        {"seed": None},
        {"sead": 1},
        {"method": 1},
    ],
)
def test_types_are_strict_and_keys_known(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GrowthConfig(**given)


def test_an_integer_is_a_number_and_a_list_is_a_tuple() -> None:
    assert OptimConfig(lr=1).lr == 1.0
    assert GrowthConfig.model_validate({"exclude_layers": [0, 3]}).exclude_layers == (0, 3)


@pytest.mark.parametrize("lr", [float("inf"), float("nan")])
def test_numbers_are_finite(lr: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        OptimConfig(lr=lr)


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        GrowthConfig().seed = 11  # type: ignore[misc]


def test_every_field_is_described() -> None:
    bare = [f"{s.__name__}.{n}" for s in SECTIONS for n, f in s.model_fields.items() if not f.description]
    assert len(SECTIONS) == 12
    assert bare == []


def test_problems_are_collected_into_one_error() -> None:
    class Pair(Section):
        low: int
        high: int = derived("At least low.", ge=0)

        def problems(self) -> Any:
            if self.low > self.high:
                yield "low: is above high"
                yield "high: is below low"

    with pytest.raises(ValidationError) as caught:
        Pair(low=2, high=1)
    (error,) = caught.value.errors()
    assert (error["type"], error["msg"]) == (SECTION_PROBLEMS, "low: is above high\nhigh: is below low")
    assert Pair(low=1, high=1).high == 1


def test_count() -> None:
    assert (count(1, "rank"), count(2, "rank")) == ("1 rank", "2 ranks")


def test_a_choice_is_a_built_in_or_a_registered_name() -> None:
    with pytest.raises(ValidationError) as caught:
        OptimConfig(lr=1, lr_decay_style="cosin")
    [error] = caught.value.errors()
    assert (error["type"], error["ctx"]) == (
        "literal_error",
        {"expected": "'cosine', 'linear', 'constant' or 'WSD'"},
    )
    extensions.register("lr_schedules", "cosin", object)
    try:
        assert OptimConfig(lr=1, lr_decay_style="cosin").lr_decay_style == "cosin"
    finally:
        extensions.unregister("lr_schedules", "cosin")
