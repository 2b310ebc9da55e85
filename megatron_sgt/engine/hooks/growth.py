"""The only place where growth meets training.

After every applied step: reduce the measured entropies, let the schedule observe them and decide, hand its plan to
the layers. A skipped step is no step of the schedule, and what was measured in it is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_sgt.checkpoint.layout import GROWTH_STATE
from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.hooks.replicas import verify_same_plan
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.errors import CheckpointError
from megatron_sgt.growth import ENTROPY, GrowthEvent, Schedule
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.model.entropy_meter import EntropyMeter, refuse_unmeasured
from megatron_sgt.parallel.collectives import broadcast_object
from megatron_sgt.parallel.groups import ParallelGroups


class GrowthHook(Hook):
    """Drives ``schedule`` from the entropies in ``meter`` and applies its plan to ``model``."""

    name = GROWTH_STATE

    def __init__(
        self,
        schedule: Schedule,
        model: torch.nn.Module,
        meter: EntropyMeter,
        groups: ParallelGroups,
        on_event: Callable[[GrowthEvent], None] = lambda event: None,
    ) -> None:
        self.schedule = schedule
        self.model = model
        self.meter = meter
        self.groups = groups
        self.on_event = on_event
        self.events: list[dict[str, Any]] = []

    def before_run(self, state: TrainState) -> None:
        """Apply the schedule's plan; forget what was measured in a step that a rollback undid."""
        self.meter.reset()
        self._observed = state.step > 0  # something, in this run
        self._obey()

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if not result.applied:
            self.meter.reset()
            return
        if ENTROPY in self.schedule.wanted:
            if (entropies := self.meter.reduce(self.groups)) is not None:
                self.schedule.observe(ENTROPY, entropies)
                self._observed = True
            elif not self._observed and self.schedule.decides_at(state.step):
                refuse_unmeasured(state.step)
        if self.groups.world_size > 1 and self.schedule.decides_at(state.step):
            # One decision for all ranks: a last-bit difference between what they observed could choose differently.
            self.schedule.load_state_dict(broadcast_object(self.schedule.state_dict(), self.groups))
        events = self.schedule.after_step(state.step)
        self._obey()
        if events:
            self.verify()
        for event in events:
            self.events.append(event.to_dict())
            self.on_event(event)

    def verify(self) -> None:
        """See ``verify_same_plan``; collective."""
        verify_same_plan(self.model, self.schedule.plan, self.groups)

    def _obey(self) -> None:
        apply_plan(self.model, self.schedule.plan)
        self.meter.enabled = ENTROPY in self.schedule.wanted

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": self.schedule.state_dict(), "events": self.events}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            CheckpointError: it belongs to other settings.
        """
        try:
            schedule, self.events = state["schedule"], list(state["events"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the checkpoint's growth state is damaged: {error!r}") from error
        self.schedule.load_state_dict(schedule)
