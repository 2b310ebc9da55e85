"""The structures that a configuration can pass through: before growth, in windows, after the last one. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_sgt.config import Config
from megatron_sgt.growth import LoopPlan, Schedule, build_schedule
from megatron_sgt.stages.stages import Stage

FIXED = "fixed"
"""Phase of the paper's schedule, and of its replays, after which nothing is decided any more."""


@dataclass(frozen=True)
class Stretch:
    """Steps ``first`` to ``last`` (from 1, both inclusive) execute ``plan``, apart from the gates of a window.

    ``phase``: vanilla, block loop, window or fixed; schedules of other packages have their own names.
    """

    first: int
    last: int
    phase: str
    plan: LoopPlan

    @property
    def steps(self) -> int:
        return self.last - self.first + 1


def schedule_of(config: Config) -> Schedule:
    """The schedule of ``config``, at its beginning.

    Raises:
        ConfigError: the schedule refuses the configuration.
    """
    return build_schedule(config.growth, config.model.num_layers, config.model.num_attention_heads)


def resumed_schedule(config: Config, saved: Mapping[str, Any] | None) -> Schedule:
    """The schedule of ``config`` where the ``saved`` state of the growth hook stands; None: at its beginning.

    Raises:
        ConfigError: the schedule refuses the configuration.
        CheckpointError: the state is of another configuration, or damaged.
    """
    schedule = schedule_of(config)
    if saved is not None:
        schedule.load_state_dict(saved["schedule"])
    return schedule


def final_plan(config: Config, together: bool = False) -> LoopPlan:
    """The most expensive structure that the configuration can end with; see ``Schedule.final_plan``."""
    return schedule_of(config).final_plan(together)


def most_kept_heads(config: Config) -> int:
    """How many heads the layer keeps that keeps most in the end; 0 where no head can loop."""
    return max(len(layer.kept_heads) for layer in final_plan(config, together=True))


def timeline(config: Config, together: bool = False) -> list[Stretch]:
    """The run from its first to its last step, under the decisions that cost most."""
    last = config.train.train_iters
    stages = list(schedule_of(config).worst_case(last, together))
    ends = [stage.step for stage in stages[1:]] + [last]
    return [
        Stretch(stage.step + 1, min(end, last), stage.phase, stage.plan)
        for stage, end in zip(stages, ends, strict=True)
        if stage.step < last and end > stage.step
    ]


def stage_timelines(stages: Sequence[Stage], together: bool = False) -> list[list[Stretch]]:
    """The same for each of a run's ``stages``, over its own steps; the schedule goes on where a model grows.

    A structure that is fixed in one stage stays with the heirs of its layers. Until then the number of loops at a step
    is that of the stage's model from the first step on. That is exact where ``growth.max_selected_layers`` can be
    selected in every stage, else at most too much: a copy that is deeper than a looping layer is never selected.
    """
    found: list[list[Stretch]] = []
    fixed: LoopPlan | None = None
    for stage in stages:
        if fixed is not None and stage.grown is not None:
            heirs = stage.grown.growth.heirs
            fixed = LoopPlan(stage.config.model.num_layers, tuple((heirs[n], layer) for n, layer in fixed.layers))
            found.append([Stretch(stage.first + 1, stage.last, FIXED, fixed)])
            continue
        whole = timeline(stage.config, together)
        inside = (one for one in whole if one.last > stage.first and one.first <= stage.last)
        found.append([replace(s, first=max(s.first, stage.first + 1), last=min(s.last, stage.last)) for s in inside])
        after = next((one for one in whole if one.first <= stage.last + 1 <= one.last), None)
        fixed = after.plan if after is not None and after.phase == FIXED else None
    return found
