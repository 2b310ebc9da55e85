"""Marks progress around what the loop calls, so that neither the loop nor its hooks know of the watch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.guard.progress import Progress

T = TypeVar("T")


class _WatchedHook(Hook):
    """A hook whose calls are phases of their own; between them the phase is the next step's training."""

    def __init__(self, hook: Hook, progress: Progress) -> None:
        self.name = hook.name
        self.pauses = hook.pauses
        self._hook = hook
        self._progress = progress

    def before_run(self, state: TrainState) -> None:
        self._progress.enter(self.name, state.step)
        self._hook.before_run(state)
        self._progress.enter("train", state.step + 1)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        self._progress.step_done()
        self._progress.enter(self.name, state.step)
        self._hook.after_step(state, result)
        self._progress.enter("train", state.step + 1)

    def after_stage(self, state: TrainState) -> None:
        self._progress.enter(self.name, state.step)
        self._hook.after_stage(state)

    def after_run(self, state: TrainState) -> None:
        self._progress.enter(self.name, state.step)
        self._hook.after_run(state)

    def on_stop(self, state: TrainState, reason: int) -> None:
        self._progress.enter(self.name, state.step)
        self._hook.on_stop(state, reason)

    def on_save_now(self, state: TrainState) -> None:
        self._hook.on_save_now(state)

    def state_dict(self) -> dict[str, Any]:
        return self._hook.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._hook.load_state_dict(state)


def watched_hooks(hooks: Sequence[Hook], progress: Progress) -> list[Hook]:
    """The same hooks, marking ``progress`` at every call."""
    return [_WatchedHook(hook, progress) for hook in hooks]


def watched_batches(batches: Iterable[T], progress: Progress) -> Iterator[T]:
    """The same micro-batches; waiting for one is the phase "data"."""
    iterator = iter(batches)
    while True:
        progress.enter("data")
        try:
            batch = next(iterator)
        except StopIteration:
            return
        progress.enter("train")
        yield batch


def watch_passes(model: torch.nn.Module, progress: Progress) -> None:
    """Mark every forward pass of training: a pipeline has fetched all micro-batches of a step before the first one."""

    def mark(module: torch.nn.Module, inputs: Any) -> None:
        if module.training:
            progress.enter("train")

    model.register_forward_pre_hook(mark)
