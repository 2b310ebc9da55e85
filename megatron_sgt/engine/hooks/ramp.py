"""Raises the mask that fades in what the model has grown (growth.ramp), once after every applied step."""

from __future__ import annotations

from megatron_sgt.config.growth import RampConfig
from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.model.ramp import RampMask
from megatron_sgt.stages.ramp import mask_at


class RampHook(Hook):
    """Sets ``mask`` by the applied steps alone, so that it has no state."""

    name = "ramp"

    def __init__(self, ramp: RampConfig, mask: RampMask) -> None:
        self.ramp = ramp
        self.mask = mask

    def before_run(self, state: TrainState) -> None:
        self.mask.set(mask_at(self.ramp, state.step))

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if result.applied and state.step <= self.ramp.end:
            self.mask.set(mask_at(self.ramp, state.step))
