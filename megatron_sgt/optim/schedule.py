"""Learning-rate schedules: pure functions of the optimizer step and of the stages of the run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from megatron_sgt import extensions
from megatron_sgt.config import Config
from megatron_sgt.config.optim import OptimConfig
from megatron_sgt.config.phases import RATE, Phase, phases_of
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.learning_rate import RatePolicy
from megatron_sgt.stages.stages import Stage

Curve = Callable[[float, OptimConfig, int], float]
"""Learning rate of an optimizer step after the warm-up: (step, settings, last step of the decay) -> lr."""


def rate_of_run(step: int, stages: Sequence[Stage]) -> float:
    """Learning rate of optimizer step ``step``, counted from 1, of a run with ``stages`` (all of them, in order)."""
    config = stages[-1].config
    own = [phase for phase in phases_of(config) if phase.first <= step and phase.settings.sets_rate]
    if own:
        return _rate_of_phase(own[-1], step, stages)
    policies = [(stage.first, stage.grown.rate) for stage in stages if stage.grown is not None]
    return rate_after(step, policies, config)


def _rate_of_phase(phase: Phase, step: int, stages: Sequence[Stage]) -> float:
    """Of a phase with a curve of its own; in phases after it without one, where that curve has ended.

    The curve is that of a run of its steps, which begins where the phase before has ended.
    """
    optim, begun = _optim_of(phase, stages)
    place, warmup = min(step, phase.last) - phase.first + 1, optim.lr_warmup_iters
    if place <= warmup:
        return begun + (optim.lr - begun) * place / warmup
    return _curve(optim.lr_decay_style)(place, optim, phase.steps)


def _optim_of(phase: Phase, stages: Sequence[Stage]) -> tuple[OptimConfig, float]:
    """The settings of the curve of ``phase`` with all of them filled in; the learning rate of the step before it."""
    optim, initial = stages[-1].config.optim, phase.first == 1
    begun = 0.0 if initial else rate_of_run(phase.first - 1, stages)
    asked = {name: getattr(phase.settings, name) for name in RATE}
    unset = {"lr": optim.lr if initial else begun, "lr_warmup_iters": optim.lr_warmup_iters if initial else 0}
    given = {name: value for name, value in asked.items() if value is not None}
    return optim.model_copy(update={**unset, "lr_decay_iters": None, **given}), begun


def rate_after(step: int, policies: Sequence[tuple[int, RatePolicy]], config: Config) -> float:
    """Learning rate of optimizer step ``step``, counted from 1, of a run that grows after the steps in ``policies``.

    The decay ends where that of the whole run does. Each stage's policy (stages/learning_rate.py) changes the place on
    the curve, or the factor, that the stage before it has left; ``continue`` changes neither.
    """
    place: float = step
    factor = 1.0
    for first, rate in policies:
        if step <= first or rate.kind == "continue":
            continue
        moved, factor = rate.place(step, first, _stretched_until(config, first))
        if rate.kind == "rewind":
            place = moved
    return factor * learning_rate(place, config.optim, config.train.train_iters)


def check_curve(stages: Sequence[Stage]) -> None:
    """Ask for the first and the last learning rate of each stage: a stage may ask a curve for places between steps.

    Raises:
        ConfigError: the curve of an installed package has none there, or that of a phase does not fall.
    """
    style = stages[-1].config.optim.lr_decay_style
    for phase in phases_of(stages[-1].config):
        if not phase.settings.sets_rate:
            continue
        optim, _ = _optim_of(phase, stages)
        if optim.min_lr > optim.lr and optim.lr_decay_style != "constant":
            raise ConfigError(
                f"{phase.where}: min_lr {optim.min_lr:g} is above lr {optim.lr:g}, with which its curve begins; set "
                "both in this phase"
            )
    for stage in stages:
        for step in (stage.first + 1, stage.last):
            try:
                rate_of_run(step, stages)
            except Exception as error:  # an installed package may raise anything
                raise ConfigError(
                    f"optim.lr_decay_style: {style} has no learning rate for step {step:,}, {type(error).__name__}: "
                    f"{error}; after lr_policy rewind a curve must take places between two steps, as floats"
                ) from error


def _stretched_until(config: Config, first: int) -> int:
    """Up to where a stage after step ``first`` stretches the curve: a final decay keeps its length."""
    end = config.lr_decay_iters
    start = _wsd_start(config.optim, end) if config.optim.lr_decay_style == "WSD" else end
    return start if first < start else end


def learning_rate(step: float, config: OptimConfig, train_iters: int) -> float:
    """Learning rate at optimizer step ``step``, counted from 1; a stage may ask for a place between two steps.

    Warm-up is linear, step 1 having lr / lr_warmup_iters (not 0). After it the curve of ``lr_decay_style`` decides:
    one of CURVES, or a ``Curve`` that is registered under the entry-point group ``megatron_sgt.lr_schedules``. With r
    in [0, 1] the share of the decay that has passed, which ends at lr_decay_iters (default train_iters):

    * constant: lr;
    * linear:   min_lr + (lr - min_lr) (1 - r);
    * cosine:   min_lr + (lr - min_lr) (1 + cos πr) / 2;
    * WSD:      lr, then linear to min_lr over the last lr_wsd_decay_iters steps before the end.
    """
    if step <= config.lr_warmup_iters:
        return config.lr * step / config.lr_warmup_iters
    return _curve(config.lr_decay_style)(step, config, config.lr_decay_iters or train_iters)


@functools.cache  # entry points are files, and this is asked every step
def _curve(name: str) -> Curve:
    return CURVES[name] if name in CURVES else extensions.load("lr_schedules", name)


def _constant(step: float, config: OptimConfig, end: int) -> float:
    return config.lr


def _linear(step: float, config: OptimConfig, end: int) -> float:
    return config.min_lr + (config.lr - config.min_lr) * (1.0 - _passed(step, config.lr_warmup_iters, end))


def _cosine(step: float, config: OptimConfig, end: int) -> float:
    ratio = _passed(step, config.lr_warmup_iters, end)
    return config.min_lr + (config.lr - config.min_lr) * (1.0 + math.cos(math.pi * ratio)) / 2.0


def _wsd(step: float, config: OptimConfig, end: int) -> float:
    return config.min_lr + (config.lr - config.min_lr) * (1.0 - _passed(step, _wsd_start(config, end), end))


def _wsd_start(config: OptimConfig, end: int) -> int:
    return max(config.lr_warmup_iters, end - (config.lr_wsd_decay_iters or 0))


def _passed(step: float, start: int, end: int) -> float:
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))


CURVES: dict[str, Curve] = {"cosine": _cosine, "linear": _linear, "constant": _constant, "WSD": _wsd}
