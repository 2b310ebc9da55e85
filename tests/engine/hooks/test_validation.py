"""Validation: when, with which structure, and that training goes on as before."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sgt.engine.hooks import validation as eval_hook
from megatron_sgt.engine.hooks.validation import EvalHook
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.evaluation.validation_set import Validated
from megatron_sgt.growth import LayerPlan, LoopPlan

GOOD = StepResult(torch.tensor(1.0), 1.0, True, 1e-3, 0.1)
SKIPPED = StepResult(torch.tensor(1.0), math.inf, False, 1e-3, 0.1)
PLAN = LoopPlan(3, ((2, LayerPlan(1, (0, 1), other_gate=0.5)),))


class Set:
    """A validation set of three micro-batches."""

    samples, size, tokens = 6, 10, 96

    def __init__(self, acts: list[Any], name: str | None, loss: float) -> None:
        self.acts, self.name, self.loss = acts, name, loss

    def __len__(self) -> int:
        return 3

    def measure(self, model: Any) -> Validated:
        self.acts.append("measured")
        return Validated(self.loss, None if self.name is None else 1.5)


class Bench:
    """The hook on a stand-in for the model; ``acts``: what happened, in order."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, loss: float = 2.0, sets: tuple[str | None, ...] = (None,), **more: Any
    ) -> None:
        self.acts: list[Any] = []
        self.records: list[dict[str, Any]] = []
        monkeypatch.setattr(eval_hook, "apply_plan", lambda model, plan: self.acts.append(plan))
        engine: Any = SimpleNamespace(module=torch.nn.Module())
        schedule: Any = SimpleNamespace(plan=PLAN)
        hub: Any = SimpleNamespace(log=lambda kind, record: self.records.append({"kind": kind, **record}))
        made: list[Any] = [Set(self.acts, name, loss) for name in sets]
        self.hook = EvalHook(engine, made, 5, schedule, hub, **more)


def test_it_measures_at_the_interval_and_at_the_end_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    for step in range(1, 13):
        bench.hook.after_step(TrainState(step), GOOD)
    bench.hook.after_run(TrainState(12))
    assert [record["step"] for record in bench.records] == [5, 10, 12]
    bench.hook.after_run(TrainState(12))
    assert len(bench.records) == 3


def test_a_skipped_step_at_the_interval_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.hook.after_step(TrainState(5), GOOD)
    bench.hook.after_step(TrainState(5, consecutive_skipped=1), SKIPPED)
    assert len(bench.records) == 1


def test_the_structure_is_inferences_and_then_trainings_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.hook.after_step(TrainState(5), GOOD)
    assert bench.acts == [PLAN.inference(), "measured", PLAN]
    assert PLAN.inference() != PLAN


@pytest.mark.parametrize(("loss", "perplexity"), [(2.0, math.exp(2.0)), (800.0, math.inf), (math.nan, math.nan)])
def test_the_record(loss: float, perplexity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, loss)
    bench.hook.after_step(TrainState(5), GOOD)
    [record] = bench.records
    assert record.pop("seconds") >= 0
    shown = {"kind": "valid", "step": 5, "loss": loss, "perplexity": perplexity, "batches": 3}
    assert record == pytest.approx(shown, nan_ok=True)
    assert bench.hook.last_loss == pytest.approx(loss, nan_ok=True)


def test_sets_by_name_are_beside_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, sets=(None, "wiki", "code"))
    bench.hook.after_step(TrainState(5), GOOD)
    [record] = bench.records
    assert bench.acts == [PLAN.inference(), *["measured"] * 3, PLAN]
    assert record["loss"] == 2.0 and record["batches"] == 9
    one = {"loss": 2.0, "perplexity": math.exp(2.0), "bits_per_byte": 1.5, "samples": 6, "samples_in_set": 10}
    assert record["sets"] == {name: one | {"tokens": 96} for name in ("wiki", "code")}
    assert bench.hook.last_losses == {"wiki": 2.0, "code": 2.0}


def test_averaged_weights_are_measured_on_every_set_and_without_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    ema: Any = SimpleNamespace(swapped_in=nullcontext)
    bench = Bench(monkeypatch, sets=("wiki",), ema=ema)
    bench.hook.after_step(TrainState(5), GOOD)
    [record] = bench.records
    assert "loss" not in record and bench.hook.last_loss is None
    assert record["sets"]["wiki"]["ema_bits_per_byte"] == 1.5


def test_a_run_that_begins_is_measured_if_asked_a_resumed_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for at_start, state, steps in (
        (True, TrainState(), [0]),
        (True, TrainState(5, 40), []),
        (True, TrainState(0, 8), []),  # its first step was skipped
        (False, TrainState(), []),
    ):
        bench = Bench(monkeypatch, at_start=at_start)
        bench.hook.before_run(state)
        assert [record["step"] for record in bench.records] == steps
