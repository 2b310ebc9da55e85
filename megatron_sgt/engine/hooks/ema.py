"""The moving average of the weights (train.ema_decay): updated after every applied step, lent to validation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed

from megatron_sgt.checkpoint.reshard.engine_state import masters_changed, masters_of
from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.model.apply_plan import begin_step
from megatron_sgt.optim.ema import WeightAverage
from megatron_sgt.parallel.groups import ParallelGroups


class EmaHook(Hook):
    """Keeps ``average``. Comes after the judgement of loss spikes, whose steps are undone, and before validation.

    A skipped step leaves the weights as they are, and the average too. What a checkpoint holds of it is a file of each
    rank (checkpoint/save.py), not a state of this hook.
    """

    name = "ema"

    def __init__(self, engine: deepspeed.DeepSpeedEngine, decay: float, groups: ParallelGroups) -> None:
        self.engine = engine
        self.average = WeightAverage(masters_of(engine, groups).tensors, decay)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if result.applied:
            self.average.update()

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model computes with the average; then with its weights again, bit for bit. Collective."""
        self._swap()
        yield  # an error inside ends the run, which saves nothing more
        self._swap()

    def _swap(self) -> None:
        with masters_changed(self.engine):
            self.average.exchange()
        begin_step(self.engine.module)
