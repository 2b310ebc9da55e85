"""Which skipped steps end a run: DeepSpeed's own scaler, and fp16 engines on CPU ranks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from megatron_sgt.engine import loop
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.loop import DivergedError, Trainer
from megatron_sgt.engine.loss_scale import SkipRule, dynamic_scaler
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.guard.stop import StopRequests
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.fake_groups import fake_groups
from tests.helpers.fp16_on_cpu import allow_fp16
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config


def scaler(scale: float = 2.0**16, least: float = 1.0) -> DynamicLossScaler:
    """With DeepSpeed's defaults for fp16."""
    return DynamicLossScaler(scale, 1000, least, 2, False)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler asks for its rank to report an overflow."""
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)


def engine_with(found: Any) -> Any:
    return SimpleNamespace(
        train=lambda: None,
        optimizer=SimpleNamespace(loss_scaler=found),
        gradient_accumulation_steps=lambda: 1,
    )


def test_who_has_a_dynamic_scale() -> None:
    found = scaler()
    assert dynamic_scaler(engine_with(found)) is found
    for engine in (engine_with(LossScaler(1.0)), SimpleNamespace(optimizer=object()), SimpleNamespace()):
        assert dynamic_scaler(engine) is None


@pytest.mark.parametrize(
    ("scale", "steps", "unexplained"),
    [
        (2.0**16, "ssssss+", [0] * 7),  # the search
        (2.0**16, "nss", [1, 1, 1]),  # no scale mends a loss that is not finite
        (2.0**16, "nnn+n", [1, 2, 3, 0, 1]),
        (2.0, "ssss", [0, 0, 1, 2]),  # once more at 2 (hysteresis), then down to 1: nothing is left to try
        (None, "sss+s", [1, 2, 3, 0, 1]),
    ],
)
def test_what_counts(scale: float | None, steps: str, unexplained: list[int]) -> None:
    found = None if scale is None else scaler(scale)
    rule = SkipRule(engine_with(found))
    counted = []
    for step in steps:
        rule.before_step()
        if found is not None:
            found.update_scale(step != "+")
        rule.after_step(step == "+", finite_loss=step != "n")
        counted.append(rule.unexplained)
    assert counted == unexplained


def run_with_overflow_above(
    monkeypatch: pytest.MonkeyPatch, limit: float, loss: float, steps: int = 5
) -> tuple[TrainState, DynamicLossScaler]:
    """The loop over a stand-in for train_step whose gradients overflow while the scale is above ``limit``."""
    found = scaler()

    def step(engine: Any, batches: Any, lr: float, clip: float, groups: Any, pieces: int) -> StepResult:
        list(batches)
        overflow = found.cur_scale > limit
        found.update_scale(overflow)
        return StepResult(torch.tensor(loss), math.inf if overflow else 1.0, not overflow, lr, 0.1)

    monkeypatch.setattr(loop, "train_step", step)
    config, state = small_config(train={"max_consecutive_skipped_steps": 3}), TrainState()
    batches = iter(dict, None)
    try:
        trainer = Trainer(config, fake_groups(), engine_with(found), state, [], StopRequests(config.train))
        trainer.run(batches, steps)  # type: ignore[arg-type]
    finally:
        result = state, found
    return result


@pytest.mark.parametrize("limit", [2.0**12, 2.0**3, 1.0])
def test_a_run_outlives_the_search(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    """At most 17 halvings and one step of hysteresis; three skipped steps in a row ended it before."""
    state, found = run_with_overflow_above(monkeypatch, limit, loss=2.0)
    assert found.cur_scale == limit
    assert state == TrainState(
        step=5, consumed_samples=2 * (5 + state.skipped_steps), skipped_steps=state.skipped_steps
    )
    assert state.skipped_steps == 1 + int(math.log2(2.0**16 / limit))


def test_a_divergence_still_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DivergedError, match=r"3 steps in a row .* \(last loss nan\)"):
        run_with_overflow_above(monkeypatch, 2.0**12, loss=math.nan)
    with pytest.raises(DivergedError, match=r"20 steps in a row .* \(last loss 2\.0000\)"):
        run_with_overflow_above(monkeypatch, 0.5, loss=2.0)


def fp16_run(info: RankInfo, zero: int, spoil: bool) -> tuple[int, int, float, str]:
    """(steps, skipped steps, loss scale, error) of a run of 4 steps that starts at a scale of 2^32.

    spoil: the last rank's loss is not finite from the third step on.
    """
    allow_fp16()
    config = small_config(
        parallel={"zero_stage": zero},
        train={"precision": "fp16", "global_batch_size": 4 * info.world_size},
        deepspeed={"fp16": {"initial_scale_power": 32}},
    )
    groups = start_processes(config, info)
    engine = build_runtime(config, groups).engine

    def batches() -> Any:
        number = 0
        while True:
            batch = random_batch(config, seed=number + 1000 * groups.dp_rank)
            if spoil and number >= 4 and info.rank == info.world_size - 1:
                batch["loss_mask"][0, 3] = math.nan
            number += 1
            yield batch

    state, error = TrainState(), ""
    try:
        Trainer(config, groups, engine, state, [], StopRequests(config.train)).run(batches(), 4)
    except DivergedError as caught:
        error = str(caught)
    return state.step, state.skipped_steps, engine.optimizer.loss_scaler.cur_scale, error


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_an_fp16_engine_finds_its_scale(zero: int) -> None:
    for steps, skipped, scale, error in run_on_ranks(2, fp16_run, zero, False):
        assert (steps, error) == (4, "")
        assert skipped > 4 and scale == 2.0 ** (32 - skipped + 1)


def test_all_ranks_end_for_one_rank_s_loss() -> None:
    for steps, skipped, _, error in run_on_ranks(2, fp16_run, 1, True):
        assert steps == 0 and "steps in a row after step 0" in error
        assert skipped == 5, "two in the search, then three with a loss that is not finite"
