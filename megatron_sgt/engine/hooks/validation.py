"""Validation every so many steps."""

from __future__ import annotations

import time

import deepspeed

from megatron_sgt.data.loader import EvalLoader
from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.hooks.ema import EmaHook
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.evaluation.perplexity import mean_loss, perplexity
from megatron_sgt.growth import Schedule
from megatron_sgt.metrics import MetricsHub
from megatron_sgt.metrics.records import ValidRecord
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.parallel.groups import ParallelGroups


class EvalHook(Hook):
    """Measures the loss on the same validation samples every time; with ``ema`` that of the averaged weights, too.

    The structure is the one that inference uses: inside a decay window the fading heads take no part.
    """

    name = "eval"
    pauses = True

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        batches: EvalLoader,
        interval: int,
        schedule: Schedule,
        hub: MetricsHub,
        groups: ParallelGroups,
        ema: EmaHook | None = None,
    ) -> None:
        self.engine = engine
        self.batches = batches
        self.interval = interval
        self.schedule = schedule
        self.hub = hub
        self.groups = groups
        self.ema = ema
        self.last_loss: float | None = None
        self.last_ema_loss: float | None = None
        self._measured_at = -1

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if result.applied and state.step % self.interval == 0:
            self._measure(state)

    def after_run(self, state: TrainState) -> None:
        """Validate the final model."""
        if self._measured_at != state.step:
            self._measure(state)

    def _measure(self, state: TrainState) -> None:
        self._measured_at = state.step
        start = time.perf_counter()
        module = self.engine.module
        apply_plan(module, self.schedule.plan.inference())
        loss = mean_loss(self.engine, self.batches, self.groups)
        if self.ema is not None:
            with self.ema.swapped_in():
                self.last_ema_loss = mean_loss(self.engine, self.batches, self.groups)
        apply_plan(module, self.schedule.plan)
        self.last_loss = loss
        record: ValidRecord = {
            "step": state.step,
            "loss": loss,
            "perplexity": perplexity(loss),
            "batches": len(self.batches),
            "seconds": time.perf_counter() - start,
        }
        if self.last_ema_loss is not None:
            record |= {"ema_loss": self.last_ema_loss, "ema_perplexity": perplexity(self.last_ema_loss)}
        self.hub.log("valid", record)
