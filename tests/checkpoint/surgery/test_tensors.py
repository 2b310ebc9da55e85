"""Moments of grown tensors, element by element."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint.reshard.rank_state import MOMENTS
from megatron_sgt.stages.operators import OPERATORS
from megatron_sgt.stages.optimizer import Carried
from tests.helpers.growing import Params, grown, random_params, shape
from tests.helpers.reference_growth import in_order

DOWN, GATE = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.gate_proj.weight"


def moments(name: str, options: dict[str, Any], carried: Carried) -> tuple[Params, Params, Params]:
    """Of the old model (the same for both moments), and the new exp_avg and exp_avg_sq."""
    old = random_params(shape())
    growth = OPERATORS[name](shape(), options)
    return old, *(grown(growth, old, quantity, carried) for quantity in MOMENTS)


@pytest.mark.parametrize("rule", ["copy", "scaled", "seeded"])
def test_moments_of_copied_layers_are_bit_equal(rule: Any) -> None:
    old, *found = moments("midas", {"block_size": 1}, Carried(7, rule))
    expected = in_order(old, [0, 1, 1, 2])
    assert all(torch.equal(new[name], tensor) for new in found for name, tensor in expected.items())


def test_rewinding_multiplies_them() -> None:
    old, exp_avg, exp_avg_sq = moments("g_stack", {"factor": 2}, Carried(10, "copy", 0.25, 0.5))
    expected = in_order(old, [0, 1, 2, 0, 1, 2])
    assert all(torch.equal(exp_avg[name], tensor * 0.25) for name, tensor in expected.items())
    assert all(torch.equal(exp_avg_sq[name], tensor * 0.5) for name, tensor in expected.items())


def test_split_units_share_their_gradients() -> None:
    """exp_avg / k and exp_avg_sq / k^2 for gate and up, as they are for down."""
    old, exp_avg, exp_avg_sq = moments("compound_grow", {"factor": 4}, Carried(7, "scaled"))
    assert torch.equal(exp_avg[GATE], torch.cat([old[GATE] / 4] * 4))
    assert torch.equal(exp_avg_sq[GATE], torch.cat([old[GATE] / 16] * 4))
    assert torch.equal(exp_avg[DOWN], torch.cat([old[DOWN]] * 4, dim=1))
    assert torch.equal(exp_avg_sq[DOWN], exp_avg[DOWN])
    _, as_they_are, _ = moments("compound_grow", {"factor": 4}, Carried(7, "copy"))
    assert torch.equal(as_they_are[GATE], torch.cat([old[GATE]] * 4))


def test_norms_of_a_wider_stream_have_larger_gradients() -> None:
    name, ratio = "model.norm.weight", 48 / 24
    old, exp_avg, exp_avg_sq = moments("msg", {"hidden_size": 48}, Carried(7, "scaled"))
    torch.testing.assert_close(exp_avg[name][:24], old[name] * ratio**0.5, rtol=1e-14, atol=0)
    torch.testing.assert_close(exp_avg_sq[name][:24], old[name] * ratio, rtol=1e-14, atol=0)
    assert not exp_avg[name][24:].any()


@pytest.mark.parametrize("rule", ["copy", "scaled", "seeded"])
def test_new_entries_have_no_moments_or_the_mean_of_their_tensor(rule: Any) -> None:
    old, exp_avg, exp_avg_sq = moments("msg", {"ffn_hidden_size": 25, "num_layers": 4}, Carried(7, rule, 1.0, 0.5))
    for name, new in ((GATE, exp_avg_sq[GATE][20:]), (DOWN, exp_avg_sq[DOWN][:, 20:])):
        torch.testing.assert_close(new, torch.full_like(new, 0.5 * float(old[name].mean()) * (rule == "seeded")))
    silent, source = "model.layers.3.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    expected = 0.5 * float(old[source].mean()) * (rule == "seeded")
    torch.testing.assert_close(exp_avg_sq[silent], torch.full_like(old[source], expected))
    assert not exp_avg[GATE][20:].any() and not exp_avg[silent].any()


def test_new_entries_depend_on_seed_stage_and_name_alone() -> None:
    old = random_params(shape())
    few, many = (OPERATORS["msg"](shape(), {"ffn_hidden_size": 25, "num_layers": n}) for n in (3, 4))
    one, other = grown(few, old), grown(many, old)
    assert torch.equal(one[GATE], other[GATE])
    assert not torch.equal(one[GATE][20:], one[GATE.replace("gate", "up")][20:])
