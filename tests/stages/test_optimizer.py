"""AdamW's step and moments after growth, in numbers: updates for a constant gradient, in learning rates."""

from __future__ import annotations

import math

import pytest

from megatron_sgt.config.optim import OptimConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.optimizer import OptimizerPolicy, carry

BETA1, STEP = 0.9, 2000


def optim(beta2: float = 0.95) -> OptimConfig:
    return OptimConfig(lr=1e-3, adam_beta2=beta2)


def updates(step: int, exp_avg: float, exp_avg_sq: float, beta2: float, count: int = 3000) -> list[float]:
    """AdamW's next updates of an entry whose gradient is always 1."""
    found = []
    for now in range(step + 1, step + count + 1):
        exp_avg = BETA1 * exp_avg + (1 - BETA1)
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2)
        found.append(exp_avg / (1 - BETA1**now) / math.sqrt(exp_avg_sq / (1 - beta2**now)))
    return found


def held(beta2: float) -> tuple[float, float]:
    """The moments that an old entry has after STEP updates."""
    return 1 - BETA1**STEP, 1 - beta2**STEP


@pytest.mark.parametrize(("beta2", "largest"), [(0.999, 6.11), (0.99, 2.13), (0.98, 1.55), (0.95, 1.10)])
def test_zero_moments_under_an_inherited_step(beta2: float, largest: float) -> None:
    found = updates(STEP, 0.0, 0.0, beta2)
    assert max(found) == pytest.approx(largest, abs=6e-3)
    if beta2 == 0.999:
        assert found[0] == pytest.approx(2.94, abs=6e-3) and found.index(max(found)) == 11
    policy = OptimizerPolicy.parse("continue")
    if beta2 > 0.98:
        with pytest.raises(ConfigError, match="choose optimizer rewind, or moments seeded"):
            carry(STEP, policy, "copy", optim(beta2), new_entries=True)
    else:
        assert carry(STEP, policy, "copy", optim(beta2), new_entries=True).step == STEP
    assert carry(STEP, policy, "copy", optim(beta2), new_entries=False).step == STEP, "nothing has zero moments"
    assert carry(STEP, policy, "seeded", optim(beta2), new_entries=True).step == STEP


@pytest.mark.parametrize("beta2", [0.95, 0.98, 0.99, 0.999])
def test_rewinding_changes_no_old_update_and_bounds_new_ones(beta2: float) -> None:
    carried = carry(STEP, OptimizerPolicy.parse("rewind"), "scaled", optim(beta2), new_entries=True)
    assert carried.step == 10
    exp_avg, exp_avg_sq = held(beta2)
    old = updates(10, exp_avg * carried.exp_avg, exp_avg_sq * carried.exp_avg_sq, beta2)
    assert max(abs(update - 1) for update in old) < 1e-12
    assert max(updates(10, 0.0, 0.0, beta2)) < 1.125


def test_a_late_step_is_no_remedy_for_zero_moments() -> None:
    assert max(updates(20, 0.0, 0.0, 0.999)) < 1.26 < 2.1 < max(updates(100, 0.0, 0.0, 0.999))
    policy = OptimizerPolicy.parse("rewind(100)")
    for moments, new_entries in (("copy", True), ("fresh", False)):
        with pytest.raises(
            ConfigError, match=r"rewind\(100\) .*: at step 100 .* choose optimizer rewind\(10\), or mom"
        ):
            carry(STEP, policy, moments, optim(0.999), new_entries)
    assert carry(STEP, policy, "copy", optim(0.98), new_entries=True).step == 100
    assert carry(STEP, policy, "copy", optim(0.999), new_entries=False).step == 100
    assert carry(STEP, policy, "seeded", optim(0.999), new_entries=True).step == 100
    assert carry(20, policy, "copy", optim(0.999), new_entries=True).step == 20


def test_a_step_of_zero_under_kept_moments_is_no_remedy() -> None:
    assert max(updates(0, *held(0.95), 0.95)) == pytest.approx(2.24, abs=0.01)
    with pytest.raises(ConfigError, match="step of 0 under kept moments"):
        carry(STEP, OptimizerPolicy.parse("fresh"), "copy", optim(), new_entries=False)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_seeded_entries_rise_to_the_learning_rate(beta2: float) -> None:
    found = updates(STEP, 0.0, held(beta2)[1], beta2)
    assert found[0] == pytest.approx(0.10, abs=1e-3) and found[-1] == pytest.approx(1.00, abs=1e-3)
    assert max(found) < 1.001


def test_policies() -> None:
    assert str(OptimizerPolicy.parse("rewind(20)")) == "rewind(20)" and str(OptimizerPolicy.parse("fresh")) == "fresh"
    early = carry(4, OptimizerPolicy.parse("rewind"), "copy", optim(), new_entries=True)
    assert (early.step, early.exp_avg, early.exp_avg_sq) == (4, 1.0, 1.0), "never forward"
    fresh = carry(STEP, OptimizerPolicy.parse("fresh"), "fresh", optim(), new_entries=True)
    assert fresh.step == 0 and not fresh.keeps_moments
    imported = carry(0, OptimizerPolicy.parse("continue"), "copy", optim(0.999), new_entries=True)
    assert imported == fresh, "an imported model has no moments"
    for text in ("rewind(0)", "continue(3)", "reset", "", f"rewind({5000 * '9'})"):
        with pytest.raises(ConfigError, match="must be continue, rewind"):
            OptimizerPolicy.parse(text)
    with pytest.raises(ConfigError, match="moments 'zero': must be one of copy, scaled, seeded, fresh"):
        carry(STEP, OptimizerPolicy.parse("continue"), "zero", optim(), new_entries=True)
