"""What a run whose model grows cannot do, seen before it starts. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_sgt.config import Config
from megatron_sgt.config.base import shown
from megatron_sgt.config.pipeline import AUTO
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth import build_schedule
from megatron_sgt.growth.inherit import Inheritance
from megatron_sgt.growth.replay import recorded_growths
from megatron_sgt.stages.growth import Growth
from megatron_sgt.stages.learning_rate import RatePolicy


def check_optimizer(config: Config) -> None:
    """Check that the state of the optimizer can go into a model of another shape.

    Raises:
        ConfigError: it cannot.
    """
    name = config.optim.optimizer
    if name != "adamw":
        raise ConfigError(
            f"growth.stages: optim.optimizer is {name}, and only what adamw keeps of each weight is known to grow; set "
            "optim.optimizer: adamw, or remove growth.stages"
        )
    if config.offload_device == "nvme":
        raise ConfigError(
            "growth.stages: deepspeed.zero_optimization.offload_optimizer.device is nvme, from where no state can be "
            "taken into a larger model; set it to cpu, or remove growth.stages"
        )


def check_replay(config: Config, growths: Sequence[tuple[int, Growth, str]], whole: bool) -> None:
    """Check that the model grows as that of the run whose decisions growth.replay repeats.

    Args:
        growths: so far: after which step, how, and by which operator.
        whole: these are all of them.

    Raises:
        ConfigError: it does not, or the record cannot be read.
    """
    if config.growth.replay is None:
        return
    end = config.train.train_iters
    recorded = [g for g in recorded_growths(Path(config.growth.replay)) if g.step < end]
    wanted = [(g.step, g.operator, g.layers) for g in (recorded if whole else recorded[: len(growths)])]
    if wanted != [(step, operator, growth.layers) for step, growth, operator in growths]:
        there = ", ".join(f"{g.operator} after step {g.step:,}" for g in recorded) or "no growth of the model"
        here = ", ".join(f"{operator} after step {step:,}" for step, _, operator in growths) or "none"
        raise ConfigError(
            f"growth.replay: {config.growth.replay} records {there}, and growth.stages name {here}; a record is "
            "repeated with the stages that it was made with"
        )


def check_rate(rate: RatePolicy, config: Config, step: int) -> None:
    """Check that the learning rate does what ``rate`` says of the steps after ``step``.

    Raises:
        ConfigError: it would not, or only in part.
    """
    end, left = config.lr_decay_iters, config.train.train_iters - step
    if rate.kind == "rewind" and rate.count >= step:
        raise ConfigError(f"lr_policy {rate}: must name a step before {step:,}, where the model grows")
    if rate.kind == "rewind" and end <= step:
        raise ConfigError(
            f"lr_policy {rate}: the decay has ended at optim.lr_decay_iters {end:,}, and after step {step:,} there is "
            "nothing left to stretch; set optim.lr_decay_iters to the end of the run, grow earlier, or choose continue"
        )
    if rate.kind == "rewarm" and rate.count > left:
        raise ConfigError(
            f"lr_policy {rate}: after step {step:,} the run has {left:,} steps, in which the learning rate would not "
            "rise to its curve; choose a smaller N, or train longer"
        )


def check_schedule(config: Config, growth: Growth, step: int) -> None:
    """Check that the schedule of ``config``, which has the old model, can go on when the model grows after ``step``.

    Raises:
        ConfigError: it cannot.
    """
    schedule = build_schedule(config.growth, config.model.num_layers, config.model.num_attention_heads)
    schedule.check_growth(step, Inheritance(growth.layers, growth.heirs, growth.heads))


def check_layout(config: Config, growth: Growth) -> None:
    """Check that the pipeline of ``config``, which has the old model, can be that of the larger one too.

    Raises:
        ConfigError: it is cut by a layout that has been written for one number of layers.
    """
    setting, before, after = (
        config.parallel.pipeline_model_parallel_layout,
        config.model.num_layers,
        len(growth.layers),
    )
    if setting != AUTO and after != before:
        raise ConfigError(
            f"parallel.pipeline_model_parallel_layout: {shown(setting)} cuts {before} layers, and the model grows to "
            f"{after}; set auto, which cuts each stage's model"
        )


def check_ramp(config: Config, where: str) -> None:
    """Check that the model of the last stage, which ``where`` leads to, has been faded in when the run ends.

    Raises:
        ConfigError: it has not.
    """
    ramp, end = config.growth.ramp, config.train.train_iters
    if ramp is not None and ramp.end > end:
        raise ConfigError(
            f"{where}: the model is faded in until step {ramp.end:,}, but the run ends at train.train_iters {end:,}; "
            "train longer, or grow with fewer ramp_steps"
        )
