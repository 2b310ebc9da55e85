"""Frequencies of scaled positions, against the formulas of their papers, and where they are put."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sgt.model.rotary import scaled_frequencies, set_positions
from tests.helpers.reference_sgt import scaled
from tests.helpers.single import random_batch, single_model, small_config

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {
        "type": "llama3", "factor": 32.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, every setting": {
        "type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "attention_factor": 1.5,
        "beta_fast": 6.0, "beta_slow": 2.0, "truncate": False,
    },
}  # fmt: skip
SIZE, THETA = 16, 1000.0


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_the_papers(name: str) -> None:
    scaling = SCALINGS[name]
    config = small_config(model={"rotary_base": THETA, "rotary_scaling": scaling})
    found, factor = scaled_frequencies(config.model)
    plain = THETA ** (-torch.arange(SIZE // 2, dtype=torch.float64) / (SIZE // 2))
    wanted, wanted_factor = scaled(plain, THETA, scaling)
    assert found is not None and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
    assert factor == pytest.approx(wanted_factor, rel=1e-12)
    assert not torch.allclose(wanted, plain, rtol=0.1), "the scaling must matter"


def test_mscale_is_a_ratio() -> None:
    scaling = {**SCALINGS["yarn"], "mscale": 1.0, "mscale_all_dim": 0.5}
    _, factor = scaled_frequencies(small_config(model={"rotary_scaling": scaling}).model)
    ln = torch.tensor(4.0, dtype=torch.float64).log()
    assert factor == pytest.approx(float((0.1 * ln + 1) / (0.05 * ln + 1)), rel=1e-12)


def test_the_model_turns_by_them() -> None:
    config = small_config(model={"rotary_scaling": SCALINGS["yarn"]})
    frequencies, factor = scaled_frequencies(config.model)
    gpt = single_model(config).chunks[0]
    assert torch.equal(gpt.rotary_pos_emb.inv_freq, frequencies)
    assert {layer.tables.factor for layer in gpt.decoder.layers} == {factor} and factor > 1.1


def test_without_a_scaling_megatron_core_has_its_own() -> None:
    assert scaled_frequencies(small_config().model) == (None, 1.0)


@pytest.mark.parametrize("name", [None, "linear", "yarn"])
def test_positions_of_another_phase_are_those_of_a_model_that_is_built_with_them(name: str | None) -> None:
    there: dict[str, Any] = {"rotary_base": THETA, "rotary_scaling": None if name is None else SCALINGS[name]}
    old, new = small_config(), small_config(model=there)
    model, built = single_model(old), single_model(new)
    batch = random_batch(old)
    before = model(**batch).detach()
    set_positions(model.chunks, new.model, torch.device("cpu"))
    assert torch.equal(model(**batch), built(**batch)) and not torch.equal(model(**batch), before)
    set_positions(model.chunks, old.model, torch.device("cpu"))
    assert torch.equal(model(**batch), before), "a rollback goes back to them"
