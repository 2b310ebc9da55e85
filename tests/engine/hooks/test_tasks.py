"""Tasks while a run trains: when, on which weights, and that nothing of training changes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sgt.engine.hooks import tasks as module
from megatron_sgt.engine.hooks.tasks import TasksHook
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.errors import DataError
from megatron_sgt.growth import LayerPlan, LoopPlan
from tests.helpers.fake_groups import fake_groups

GOOD = StepResult(torch.tensor(1.0), 1.0, True, 1e-3, 0.1)
PLAN = LoopPlan(3, ((2, LayerPlan(1, (0, 1), other_gate=0.5)),))


class Engine(torch.nn.Module):
    """Has a module."""

    def __init__(self) -> None:
        super().__init__()
        self.module = torch.nn.Dropout()


class Bench:
    """The hook on a stand-in for the model; ``acts``: what happened, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, interval: int = 5, averaged: bool = False) -> None:
        self.acts: list[Any] = []
        self.records: list[dict[str, Any]] = []
        self.failure: Exception | None = None
        monkeypatch.setattr(module, "apply_plan", lambda model, plan: self.acts.append(plan))
        self.engine = Engine()
        schedule: Any = SimpleNamespace(plan=PLAN)
        hub: Any = SimpleNamespace(log=lambda kind, record: self.records.append({"kind": kind, **record}))
        live: Any = SimpleNamespace(together=lambda work: work())
        ema: Any = SimpleNamespace(swapped_in=self.swapped_in) if averaged else None
        engine: Any = self.engine
        self.hook = TasksHook(engine, live, self.answer, interval, schedule, hub, fake_groups(), ema)

    def answer(self, live: Any) -> dict[str, dict[str, float]]:
        """As the harness does, seed everything."""
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        self.acts.append(self.engine.module.training)
        if self.failure is not None:
            raise self.failure
        return {"words": {"acc": 0.5}}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        self.acts.append("in")
        yield
        self.acts.append("out")


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


@pytest.mark.parametrize(("interval", "steps"), [(5, [5, 10, 12]), (0, [12]), (6, [6, 12])])
def test_at_the_interval_and_at_the_end_once(interval: int, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, interval)
    for step in range(1, 13):
        bench.hook.after_step(TrainState(step), GOOD)
    bench.hook.after_run(TrainState(12))
    assert [record["step"] for record in bench.records] == steps
    assert {key: value for key, value in bench.records[0].items() if key != "seconds"} == {
        "kind": "tasks", "step": steps[0], "weights": "weights", "results": {"words": {"acc": 0.5}},
    }  # fmt: skip


def test_training_goes_on_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    expected = drawn()
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    bench.hook.after_step(TrainState(5), GOOD)
    assert bench.acts == [PLAN.inference(), False, PLAN]
    assert bench.engine.module.training and drawn() == expected


def test_the_average_is_measured_where_one_is_kept_and_given_back_after_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch, averaged=True)
    bench.failure = DataError("the data of words cannot be read")
    bench.hook.after_step(TrainState(5), GOOD)
    [record] = bench.records
    assert record["failed"] == "the data of words cannot be read" and "results" not in record
    assert bench.acts == [PLAN.inference(), "in", False, "out", PLAN] and record["weights"] == "average"
    bench.failure = RuntimeError("out of memory")
    with pytest.raises(RuntimeError):
        bench.hook.after_run(TrainState(6))
