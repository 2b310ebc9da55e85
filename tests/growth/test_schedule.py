"""What every schedule gets from its base class: events, state that fits one rule only, defaults for planning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.growth import GrowthEvent, LayerPlan, LoopPlan, Schedule, SGTSchedule, Stage
from megatron_sgt.growth.static import Vanilla


class Upwards(Schedule):
    """Observes nothing: after every second step one more layer loops head 0, from layer 0 on."""

    name = "upwards"

    def __init__(self, config: GrowthConfig, num_layers: int, num_heads: int) -> None:
        super().__init__(config, num_layers, num_heads)
        self.layers = 0

    @property
    def plan(self) -> LoopPlan:
        return LoopPlan(self.num_layers, tuple((n, LayerPlan(1, (0,))) for n in range(self.layers)))

    def after_step(self, step: int) -> list[GrowthEvent]:
        if step % 2 or self.layers == self.num_layers:
            return []
        self.layers += 1
        return [self.event(step, "one_more", self.layers - 1)]

    def final_plan(self, together: bool = False) -> LoopPlan:
        return LoopPlan(self.num_layers, tuple((n, LayerPlan(1, (0,))) for n in range(self.num_layers)))

    def progress(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def restore(self, progress: Mapping[str, Any]) -> None:
        self.layers = int(progress["layers"])


class Second(Upwards):
    version = 2


class Watching(Upwards):
    probes = frozenset({"entropy"})


def upwards(rule: type[Upwards] = Upwards) -> Upwards:
    return rule(GrowthConfig(), 3, 2)


def test_an_event_holds_the_structure_after_it() -> None:
    schedule = upwards()
    events = [event for step in range(1, 5) for event in schedule.after_step(step)]
    assert [event.to_dict() for event in events] == [
        {
            "step": step,
            "action": "one_more",
            "layer": layer,
            "phase": "growing",
            "kept_heads": {str(n): [0] for n in range(layer + 1)},
            "loop_depth": [int(n <= layer) for n in range(3)],
            "layer_score": None,
        }
        for step, layer in ((2, 0), (4, 1))
    ]


def test_a_rule_that_observes_nothing_is_planned_by_running_it() -> None:
    schedule = upwards()
    stages = list(schedule.worst_case(5))
    assert [(stage.step, stage.phase, sum(stage.plan.loops)) for stage in stages] == [
        (0, "vanilla", 0),
        (2, "growing", 1),
        (4, "growing", 2),
    ]
    assert schedule.layers == 0, "planning leaves the schedule alone"
    assert schedule.max_loops == 1 and not schedule.decides_at(2)


def test_of_a_rule_that_observes_the_final_plan_is_assumed_from_the_start() -> None:
    schedule = upwards(Watching)
    assert list(schedule.worst_case(5)) == [Stage(0, "upwards", schedule.final_plan())]
    assert schedule.wanted == {"entropy"} and schedule.decides_at(1)
    with pytest.raises(NotImplementedError, match="upwards asks for entropy"):
        schedule.observe("entropy", np.zeros((3, 2, 2)))


def test_state_continues_under_the_same_rule_and_version_only() -> None:
    schedule = upwards()
    schedule.after_step(2)
    state = json.loads(json.dumps(schedule.state_dict()))
    other = upwards()
    other.load_state_dict(state)
    assert other.plan == schedule.plan != LoopPlan.empty(3)
    with pytest.raises(CheckpointError, match=r"version of the growth rule \(checkpoint 1, run 2\)"):
        upwards(Second).load_state_dict(state)
    for standard in (SGTSchedule(GrowthConfig(), 3, 2), Vanilla(GrowthConfig(), 3, 2)):
        with pytest.raises(CheckpointError, match=rf"growth rule \(checkpoint 'upwards', run '{standard.name}'"):
            standard.load_state_dict({**standard.state_dict(), "rule": "upwards"})
    with pytest.raises(CheckpointError, match="growth state is damaged: KeyError: 'layers'"):
        upwards().load_state_dict({k: v for k, v in state.items() if k != "layers"})


@pytest.mark.parametrize(
    "config",
    [
        GrowthConfig(),
        GrowthConfig(method="vanilla"),
        GrowthConfig(method="block_loop", block_loop_layers=(1,)),
    ],
    ids=lambda config: config.method,
)
def test_checkpoints_without_a_rule_are_of_the_built_in_method(config: GrowthConfig) -> None:
    from megatron_sgt.growth import build_schedule

    schedule = build_schedule(config, 3, 2)
    old = schedule.state_dict()
    del old["rule"], old["rule_version"], old["config"]["options"]
    schedule.load_state_dict(old)
    with pytest.raises(CheckpointError, match="growth rule"):
        upwards().load_state_dict({**old, "layers": 1})


def test_a_rule_takes_no_imported_loops_unless_it_says_how() -> None:
    assert Upwards.settings_for(LoopPlan.empty(3), 2) is None
    with pytest.raises(ConfigError, match=r"growth\.method: is upwards, which cannot go on"):
        upwards().adopt(upwards().final_plan())


def test_a_ramp_is_no_part_of_the_rule() -> None:
    ramp = {"first": 3, "steps": 3, "layers": [3]}
    state = Vanilla(GrowthConfig.model_validate({"method": "vanilla", "ramp": ramp}), 4, 2).state_dict()
    Vanilla(GrowthConfig(method="vanilla"), 4, 2).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"growth\.window_size \(checkpoint 250, run 9\)"):
        Vanilla(GrowthConfig(method="vanilla", window_size=9), 4, 2).load_state_dict(state)
