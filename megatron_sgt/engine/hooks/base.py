"""What can be attached to the training loop. Growth, logging, validation, saving and a user's own hooks are equals.

A package adds a hook under the entry-point group ``megatron_sgt.hooks`` (see extensions.py): whatever returns a Hook
when it is called without arguments, a class as a rule. docs/extending.md has an example.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import deepspeed

from megatron_sgt import extensions
from megatron_sgt.config import Config
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth import Schedule
from megatron_sgt.metrics import MetricsHub
from megatron_sgt.model.gpt import LanguageModel
from megatron_sgt.parallel.groups import ParallelGroups

BUILT_IN = ("spike", "ema", "ramp", "growth", "log", "straggler", "eval", "tasks", "replicas", "checkpoint")
"""Names of the hooks that this project brings, in the order in which they act."""
_OTHER_PHASES = ("train", "data")
"""What the watch calls the loop's own parts of a step (guard/progress.py)."""


@dataclass
class RunParts:
    """What a user's hook may look at. ``hub`` has writers on rank 0 alone: every rank may call it.

    When the model has been replaced by a larger one (docs/growing.md), model and engine are gone from here.
    """

    config: Config
    groups: ParallelGroups
    model: LanguageModel
    engine: deepspeed.DeepSpeedEngine
    schedule: Schedule
    hub: MetricsHub

    def release(self) -> None:
        """Forget the model and the engine."""
        del self.model, self.engine


class Hook:
    """Base of all hooks: does nothing, keeps nothing. The loop calls every method on every rank.

    ``name``: its key in the checkpoint, and of its calls in messages about a hanging run. ``pauses``: after a step it
    holds training up for work of its own (validation, saving), and reports how long: that time is no step's.
    """

    name = "hook"
    pauses = False

    def attach(self, parts: RunParts) -> None:
        """Called on a user's hook: the run is built, and no checkpoint is loaded yet.

        Once; of a model that grows (docs/growing.md), whenever a stage is built. A hook that keeps the model or the
        engine elsewhere than in ``parts`` keeps their memory until then.
        """

    def before_run(self, state: TrainState) -> None:
        """After a checkpoint was loaded and before the first step; again after a rollback, and in each new stage."""

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """After every step, applied or skipped; ``state`` counts it already."""

    def after_stage(self, state: TrainState) -> None:
        """After the last step of a stage that another follows: the model is about to be replaced by a larger one.

        A user's hook gets the new parts through ``attach``, then its own state through ``load_state_dict``.
        """

    def after_run(self, state: TrainState) -> None:
        """Once, after the last step of the run."""

    def on_stop(self, state: TrainState, reason: int) -> None:
        """Instead of ``after_run``, when the run was asked to stop (see guard/stop.py): keep it short.

        Not where the request comes while the model of the next stage is being built.
        """

    def on_save_now(self, state: TrainState) -> None:
        """The run was asked to save without stopping: it will do so after its next applied step."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: JSON-able, and the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``'s value. A rollback calls it in the middle of a run."""


class MeasuringHook(Hook):
    """Measures the model every ``interval`` applied steps, and after the last one; 0: only then. For a base."""

    pauses = True

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._measured_at = -1

    def measure(self, state: TrainState) -> None:
        """Once for a step at most."""
        raise NotImplementedError

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if self.interval and result.applied and state.step % self.interval == 0:
            self._measure_now(state)

    def after_run(self, state: TrainState) -> None:
        """Measure the final model."""
        if self._measured_at != state.step:
            self._measure_now(state)

    def _measure_now(self, state: TrainState) -> None:
        self._measured_at = state.step
        self.measure(state)


def own_hooks(config: Config, given: Sequence[Hook] = ()) -> list[Hook]:
    """The user's hooks, in the order in which they act: ``given``, then those that train.hooks names.

    Raises:
        ConfigError: a name is not registered, what it stands for makes no Hook, or two hooks have one name.
    """
    hooks = list(given)
    for registered in config.train.hooks:
        make = extensions.load("hooks", registered)
        try:
            with suppress(ValueError):  # some built-in types tell no signature
                inspect.signature(make).bind()
        except TypeError as error:
            raise ConfigError(f"train.hooks: {registered!r} cannot be made without arguments: {error}") from error
        hook = make()
        if not isinstance(hook, Hook):
            raise ConfigError(f"train.hooks: {registered!r} makes a {type(hook).__name__}, not a Hook")
        hooks.append(hook)
    taken = {*BUILT_IN, *_OTHER_PHASES, Hook.name}
    for hook in hooks:
        if hook.name in taken:
            raise ConfigError(
                f"hook {type(hook).__name__}: its name {hook.name!r} is taken; a hook's state is found by it, so "
                "give it a name of its own"
            )
        taken.add(hook.name)
    return hooks
