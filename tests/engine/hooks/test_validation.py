"""Validation: when, with which structure, and that training goes on as before."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sgt.engine.hooks import validation as eval_hook
from megatron_sgt.engine.hooks.validation import EvalHook
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.growth import LayerPlan, LoopPlan
from tests.helpers.fake_groups import fake_groups

GOOD = StepResult(torch.tensor(1.0), 1.0, True, 1e-3, 0.1)
SKIPPED = StepResult(torch.tensor(1.0), math.inf, False, 1e-3, 0.1)
PLAN = LoopPlan(3, ((2, LayerPlan(1, (0, 1), other_gate=0.5)),))


class Bench:
    """The hook on a stand-in for the model; ``acts``: what happened, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loss: float = 2.0) -> None:
        self.acts: list[Any] = []
        self.records: list[dict[str, Any]] = []
        monkeypatch.setattr(eval_hook, "apply_plan", lambda model, plan: self.acts.append(plan))
        monkeypatch.setattr(eval_hook, "mean_loss", lambda *_: self.acts.append("measured") or loss)
        engine: Any = SimpleNamespace(module=torch.nn.Module())
        schedule: Any = SimpleNamespace(plan=PLAN)
        hub: Any = SimpleNamespace(log=lambda kind, record: self.records.append({"kind": kind, **record}))
        batches: Any = [0, 1, 2]
        self.hook = EvalHook(engine, batches, 5, schedule, hub, fake_groups())


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
