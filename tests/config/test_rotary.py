"""Settings of scaled rotary positions: what each type needs, what it may not have, what no run can have."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sgt.config import Config, parse_config
from megatron_sgt.config.rotary import NOT_TRAINED, RotaryScaling
from megatron_sgt.errors import ConfigError
from tests.helpers.single import SMALL

LLAMA3 = {
    "type": "llama3", "factor": 8, "original_max_position_embeddings": 8192, "low_freq_factor": 1,
    "high_freq_factor": 4,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}


def run(scaling: Any) -> Config:
    return parse_config({**SMALL, "model": {**SMALL["model"], "rotary_scaling": scaling}}, "a test")


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ({"type": "linear"}, "model.rotary_scaling.factor: is required"),
        ({"type": "linear", "factor": 0.5}, "model.rotary_scaling.factor: must be >= 1, got 0.5"),
        ({"type": "lama3", "factor": 8}, "scaling.type: must be 'linear', 'llama3' or 'yarn', got 'lama3'"),
        ({"type": "dynamic", "factor": 2}, "'dynamic' cannot be trained: its frequencies depend on the length"),
        ({**LLAMA3, "low_freq_factor": None}, "model.rotary_scaling.low_freq_factor: type llama3 needs it"),
        ({**LLAMA3, "beta_fast": 32}, "model.rotary_scaling.beta_fast: type llama3 does not have it; remove it"),
        ({**LLAMA3, "high_freq_factor": 1}, "scaling.high_freq_factor: must be > low_freq_factor 1, got 1"),
        ({"type": "yarn", "factor": 4}, "original_max_position_embeddings: type yarn needs it"),
        ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_slow": 33},
         "beta_slow: must be <= beta_fast 32, got 33"),
        ({"rope_type": "linear", "factor": 2}, "did you mean 'model.rotary_scaling.type'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(scaling: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run(scaling)
    assert says in str(refused.value)


@pytest.mark.parametrize("kind", NOT_TRAINED)
def test_types_of_transformers_that_no_run_has_say_why(kind: str) -> None:
    with pytest.raises(ConfigError, match=NOT_TRAINED[kind]):
        run({"type": kind, "factor": 2})


def test_only_what_changes_a_position_is_the_formula() -> None:
    scaling = run({**LLAMA3, "context_length": 131072}).model.rotary_scaling
    assert scaling is not None
    assert scaling.formula() == {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }  # fmt: skip
    assert scaling.describe() == "llama3, factor 8 of 8192 tokens"
    assert RotaryScaling(type="linear", factor=2.5).describe() == "linear, factor 2.5"


def test_yarn_needs_a_base_whose_logarithm_divides() -> None:
    model = {**SMALL["model"], "rotary_base": 1.0}
    with pytest.raises(ConfigError, match=r"model\.rotary_base: rotary_scaling\.type yarn needs one above 1, got 1"):
        parse_config({**SMALL, "model": {**model, "rotary_scaling": YARN}}, "a test")
    parse_config({**SMALL, "model": {**model, "rotary_scaling": LLAMA3}}, "a test")


def test_another_projects_names_are_hinted_at() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'model\.rotary_scaling'\?"):
        parse_config({**SMALL, "model": {**SMALL["model"], "rope_scaling": LLAMA3}}, "a test")
