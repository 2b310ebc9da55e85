"""Where growth meets training: applied steps only, one decision for all ranks, the plan in force at once."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.engine.hooks import growth as growth_hook
from megatron_sgt.engine.hooks.growth import GrowthHook
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.growth import GrowthEvent, LoopPlan, Schedule, build_schedule
from megatron_sgt.parallel.groups import ParallelGroups
from tests.helpers.fake_groups import fake_groups

LAYERS, HEADS = 4, 4
GROWTH = GrowthConfig(first_selection_step=2, window_size=2, max_selected_layers=1, max_loop_depth=1)
GOOD = StepResult(torch.tensor(1.0), 1.0, True, 1e-3, 0.1)
SKIPPED = StepResult(torch.tensor(1.0), float("inf"), False, 1e-3, 0.1)


class Meter:
    """Gives the same table of entropies every step, and counts what is asked of it."""

    def __init__(self, passes: int = 2) -> None:
        self.enabled = False
        self.reduced = self.forgotten = 0
        rng = np.random.default_rng(0)
        self.table = rng.uniform(0.2, 0.9, (LAYERS, passes, HEADS))

    def reduce(self, groups: ParallelGroups) -> np.ndarray:
        self.reduced += 1
        return self.table.copy()

    def reset(self) -> None:
        self.forgotten += 1


class Bench:
    """A hook with everything around it, and the plans that reached the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, growth: GrowthConfig = GROWTH) -> None:
        self.schedule: Schedule = build_schedule(growth, LAYERS, HEADS)
        self.meter: Any = Meter(1 + growth.max_loop_depth)
        self.events: list[GrowthEvent] = []
        self.plans: list[LoopPlan] = []
        monkeypatch.setattr(growth_hook, "apply_plan", lambda model, plan: self.plans.append(plan))
        model = torch.nn.Module()
        self.hook = GrowthHook(self.schedule, model, self.meter, fake_groups(), self.events.append)

    def run(self, steps: int) -> None:
        self.hook.before_run(TrainState())
        for step in range(1, steps + 1):
            self.hook.after_step(TrainState(step), GOOD)


def test_decisions_reach_the_model_and_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.run(5)
    assert [(event.step, event.action) for event in bench.events] == [(2, "first_selection"), (4, "fixed")]
    assert bench.hook.events == [event.to_dict() for event in bench.events]
    phases = [plan[LAYERS - 1].phase for plan in bench.plans]
    assert phases == ["off", "off", "window", "window", "sparse", "sparse"]
    assert [plan[LAYERS - 1].other_gate for plan in bench.plans[2:]] == [1.0, 0.5, 0.0, 0.0]


def test_entropy_is_measured_only_while_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.run(4)
    assert (bench.meter.reduced, bench.meter.enabled) == (4, False)
    bench.hook.after_step(TrainState(5), GOOD)
    assert bench.meter.reduced == 4


def test_vanilla_never_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, GrowthConfig(method="vanilla"))
    bench.run(4)
    assert (bench.meter.reduced, bench.meter.enabled) == (0, False)
    assert set(bench.plans) == {LoopPlan.empty(LAYERS)}


def test_a_skipped_step_is_no_step_of_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.run(1)
    before, plans, forgotten = bench.schedule.state_dict(), len(bench.plans), bench.meter.forgotten
    for _ in range(3):
        bench.hook.after_step(TrainState(1, consecutive_skipped=1), SKIPPED)
    assert bench.schedule.state_dict() == before
    assert (bench.meter.reduced, bench.meter.forgotten - forgotten, len(bench.plans)) == (1, 3, plans)
    bench.hook.after_step(TrainState(2), GOOD)
    assert [event.step for event in bench.events] == [2]


def test_a_step_that_measured_nothing_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sequence of it counted: the averages stay, and what is decided after it is decided."""
    bench, other = Bench(monkeypatch), Bench(monkeypatch)
    bench.run(1)
    other.run(1)
    before = bench.schedule.ema.copy()  # type: ignore[attr-defined]
    monkeypatch.setattr(bench.meter, "reduce", lambda groups: None)
    for one in (bench, other):
        one.hook.after_step(TrainState(2), GOOD)
    assert np.array_equal(bench.schedule.ema, before)  # type: ignore[attr-defined]
    assert not np.array_equal(other.schedule.ema, before)  # type: ignore[attr-defined]
    assert [event.action for event in bench.events] == ["first_selection"]


def test_nothing_is_decided_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sequence ever counted, so that all averages are still 0."""
    bench = Bench(monkeypatch)
    monkeypatch.setattr(bench.meter, "reduce", lambda groups: None)
    with pytest.raises(ConfigError, match=r"entropy_min_document_tokens: a decision is due after step 2, and no sequ"):
        bench.run(2)
    assert bench.events == []


def test_an_entropy_that_is_not_finite_changes_nothing_of_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.run(1)
    before = bench.schedule.ema
    bench.meter.table[1, 0, 2] = np.nan
    bench.meter.table[2, 0, 1] = np.inf
    bench.hook.after_step(TrainState(2), GOOD)
    changed = bench.schedule.ema != before
    assert not changed[1, 2] and not changed[2, 1] and changed.sum() == LAYERS * HEADS - 2


def test_state_survives_json_and_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, first, second = Bench(monkeypatch), Bench(monkeypatch), Bench(monkeypatch)
    whole.run(4)
    first.run(3)
    second.hook.load_state_dict(json.loads(json.dumps(first.hook.state_dict())))
    second.plans.clear()
    monkeypatch.setattr(growth_hook, "apply_plan", lambda model, plan: second.plans.append(plan))
    second.hook.before_run(TrainState(3))
    assert second.plans == [first.schedule.plan], "the loaded plan is in force before the first step"
    second.hook.after_step(TrainState(4), GOOD)
    assert second.hook.state_dict() == whole.hook.state_dict()


@pytest.mark.parametrize("damage", [{}, {"schedule": {}}, {"schedule": {}, "events": []}, {"schedule": 1, "events": 2}])
def test_damaged_state_is_refused(damage: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="growth state is damaged"):
        Bench(monkeypatch).hook.load_state_dict(damage)
