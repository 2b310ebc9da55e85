"""The structures that a configuration can pass through: before growth, in windows, after the last one. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sgt.config import Config
from megatron_sgt.growth import LoopPlan, Schedule, build_schedule


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
