"""The stages of a run: each trains one model, and grows into the next. No torch.

``stages_of`` is the only source of the shapes that a run passes through. Whatever works on one stage (the engine, a
plan, a checkpoint's files) gets ``Stage.config``, which is an ordinary configuration without stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_sgt.config import Config
from megatron_sgt.config.growth import StageConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.config import grown_config
from megatron_sgt.stages.growth import Growth, Operator
from megatron_sgt.stages.learning_rate import RatePolicy
from megatron_sgt.stages.limits import (
    check_layout,
    check_optimizer,
    check_ramp,
    check_rate,
    check_replay,
    check_schedule,
)
from megatron_sgt.stages.maps import has_new_entries, maps_of
from megatron_sgt.stages.operators import operator_named
from megatron_sgt.stages.optimizer import Carried, OptimizerPolicy, carry


@dataclass(frozen=True)
class Grown:
    """How a stage came out of the one before it."""

    operator: Operator
    growth: Growth
    settings: StageConfig
    policy: OptimizerPolicy
    moments: str
    rate: RatePolicy

    @cached_property
    def new_entries(self) -> bool:
        """Whether some entries of the new model are copies of none."""
        return has_new_entries(maps_of(self.growth.with_a_vocabulary))

    def carried(self, step: int, config: Config) -> Carried:
        """What goes on of AdamW after ``step`` updates.

        Raises:
            ConfigError: new entries would make updates that are far too large.
        """
        return carry(step, self.policy, self.moments, config.optim, self.new_entries)


@dataclass(frozen=True)
class Stage:
    """One part of a run.

    Attributes:
        index: from 0.
        first: applied steps before it.
        last: applied steps after it.
        config: of this stage alone: its model, the layers that settings name, no stages.
        grown: how it came out of the stage before; None for the first.
    """

    index: int
    first: int
    last: int
    config: Config
    grown: Grown | None = None

    def record(self) -> dict[str, Any]:
        """What a checkpoint remembers of how the stage began, JSON-able; {} for the first."""
        if self.grown is None:
            return {}
        settings = self.grown.settings
        return {
            "step": self.first,
            "operator": settings.operator,
            "options": dict(settings.options),
            "moments": self.grown.moments,
            "optimizer": str(self.grown.policy),
            "lr_policy": str(self.grown.rate),
            "weights": settings.weights,
        }


def stages_of(config: Config) -> tuple[Stage, ...]:
    """All stages of ``config``, checked; one without ``growth.stages``.

    Raises:
        ConfigError: an operator or its options do not fit the model, a grown model does not fit the run, the stages
            are not in order, the schedule or the optimizer cannot go on, or what becomes of the latter would spoil it.
    """
    if config.growth.stages:
        check_optimizer(config)
    stages: list[Stage] = []
    growths: list[tuple[int, Growth, str]] = []
    begun, grown, current, where = 0, None, _without_stages(config), "growth.ramp"
    for number, settings in enumerate(config.growth.stages):
        where = f"growth.stages[{number}]"
        last = settings.last_step(config.tokens_per_step)
        if last <= begun:
            raise ConfigError(f"{where}: ends at step {last:,}, which is not after step {begun:,} where it begins")
        if last >= config.train.train_iters:
            raise ConfigError(
                f"{where}: ends at step {last:,}, but the run at train.train_iters {config.train.train_iters:,}; let "
                "it end earlier, or remove it"
            )
        stages.append(Stage(number, begun, last, current, grown))
        try:
            grown = _grown(settings, current, last)
            growths.append((last, grown.growth, settings.operator))
            check_replay(config, growths, whole=False)
            check_layout(current, grown.growth)
            after = grown_config(current, grown.growth, last)
            check_schedule(current, grown.growth, last)
            grown.carried(last, after)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        begun, current = last, after
    check_replay(config, growths, whole=True)
    check_ramp(current, where)
    stages.append(Stage(len(stages), begun, config.train.train_iters, current, grown))
    return tuple(stages)


def stage_after(stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that trains step ``step`` + 1; after the end the last one."""
    return next((stage for stage in stages if step < stage.last), stages[-1])


def _grown(settings: StageConfig, config: Config, step: int) -> Grown:
    operator = operator_named(settings.operator)
    rate = RatePolicy.parse(settings.lr_policy)
    check_rate(rate, config, step)
    if settings.weights == "ema" and not config.train.ema_decay:
        raise ConfigError("weights ema: there is no average of the weights; set train.ema_decay")
    return Grown(
        operator,
        operator(config.model, settings.options),
        settings,
        OptimizerPolicy.parse(settings.optimizer or operator.optimizer),
        settings.moments or operator.moments,
        rate,
    )


def _without_stages(config: Config) -> Config:
    if not config.growth.stages:
        return config
    return config.model_copy(update={"growth": config.growth.model_copy(update={"stages": ()})})
