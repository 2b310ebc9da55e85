"""Validation every so many steps."""

from __future__ import annotations

import time
from collections.abc import Sequence

import deepspeed

from megatron_sgt.engine.hooks.base import MeasuringHook
from megatron_sgt.engine.hooks.ema import EmaHook
from megatron_sgt.engine.step import TrainState
from megatron_sgt.evaluation.validation_set import Validated, ValidationSet
from megatron_sgt.growth import Schedule
from megatron_sgt.metrics import MetricsHub
from megatron_sgt.metrics.records import SetRecord, ValidRecord
from megatron_sgt.model.apply_plan import apply_plan


class EvalHook(MeasuringHook):
    """Measures the loss on the same validation samples every time; with ``ema`` that of the averaged weights, too.

    The structure is the one that inference uses: inside a decay window the fading heads take no part.

    Args:
        sets: the validation split, if there is one, and those of data.valid.
        at_start: validate before the first step of the run, too.
    """

    name = "eval"

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        sets: Sequence[ValidationSet],
        interval: int,
        schedule: Schedule,
        hub: MetricsHub,
        ema: EmaHook | None = None,
        at_start: bool = False,
    ) -> None:
        super().__init__(interval)
        self.engine = engine
        self.sets = sets
        self.schedule = schedule
        self.hub = hub
        self.ema = ema
        self.at_start = at_start
        self.last_loss: float | None = None
        self.last_ema_loss: float | None = None
        self.last_losses: dict[str, float] = {}
        """Of the sets of data.valid, by name."""

    def before_run(self, state: TrainState) -> None:
        """A checkpoint has been loaded by now: only a run that begins is at step 0."""
        if self.at_start and state.consumed_samples == state.step == 0:
            self._measure_now(state)

    def measure(self, state: TrainState) -> None:
        start = time.perf_counter()
        module = self.engine.module
        apply_plan(module, self.schedule.plan.inference())
        found = self._of_all_sets()
        averaged: dict[str | None, Validated] = {}
        if self.ema is not None:
            with self.ema.swapped_in():
                averaged = self._of_all_sets()
        apply_plan(module, self.schedule.plan)
        record: ValidRecord = {"step": state.step}
        if None in found:
            record |= self._fields(None, found, averaged)  # type: ignore[typeddict-item]
            self.last_loss = found[None].loss
            self.last_ema_loss = averaged[None].loss if averaged else None
        record["batches"] = sum(len(one) for one in self.sets)
        named = {one.name: self._named(one, found, averaged) for one in self.sets if one.name is not None}
        if named:
            record["sets"] = named
            self.last_losses = {name: found[name].loss for name in named}
        record["seconds"] = time.perf_counter() - start
        self.hub.log("valid", record)

    def _of_all_sets(self) -> dict[str | None, Validated]:
        return {one.name: one.measure(self.engine) for one in self.sets}

    @staticmethod
    def _fields(
        name: str | None, found: dict[str | None, Validated], averaged: dict[str | None, Validated]
    ) -> dict[str, float]:
        return found[name].fields() | (averaged[name].fields("ema_") if averaged else {})

    def _named(
        self, one: ValidationSet, found: dict[str | None, Validated], averaged: dict[str | None, Validated]
    ) -> SetRecord:
        extent: SetRecord = {"samples": one.samples, "samples_in_set": one.size, "tokens": one.tokens}
        return self._fields(one.name, found, averaged) | extent  # type: ignore[return-value]
