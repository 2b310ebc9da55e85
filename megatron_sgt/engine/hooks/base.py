"""What can be attached to the loop: growth, logging, validation and saving are equals."""

from __future__ import annotations

from typing import Any, Protocol

from megatron_sgt.engine.state import TrainState
from megatron_sgt.engine.step import StepResult


class Hook(Protocol):
    """Called by the loop. ``name`` is its key in the checkpoint; the state is JSON-able.

    ``pauses``: after a step it holds training up for work of its own (validation, saving), and reports how long:
    that time is no step's.
    """

    name: str
    pauses: bool

    def before_run(self, state: TrainState) -> None:
        """Once, after a checkpoint was loaded and before the first step."""

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """After every step, applied or skipped; ``state`` counts it already."""

    def after_run(self, state: TrainState) -> None:
        """Once, after the last step."""

    def on_stop(self, state: TrainState, reason: int) -> None:
        """Instead of ``after_run``, when the run was asked to stop (see guard/stop.py): keep it short."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``'s value."""


class StatelessHook:
    """Base of hooks that keep nothing over a restart; every method does nothing."""

    name = "hook"
    pauses = False

    def before_run(self, state: TrainState) -> None:
        """See Hook."""

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """See Hook."""

    def after_run(self, state: TrainState) -> None:
        """See Hook."""

    def on_stop(self, state: TrainState, reason: int) -> None:
        """See Hook."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
