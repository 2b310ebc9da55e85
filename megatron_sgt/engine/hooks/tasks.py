"""Downstream tasks every so many steps (evaluation.tasks)."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

import deepspeed
import numpy as np

from megatron_sgt.engine.hooks.base import MeasuringHook
from megatron_sgt.engine.hooks.ema import EmaHook
from megatron_sgt.engine.step import TrainState
from megatron_sgt.errors import DataError
from megatron_sgt.evaluation.downstream import Results
from megatron_sgt.evaluation.live_model import LiveModel
from megatron_sgt.growth import Schedule
from megatron_sgt.metrics import MetricsHub
from megatron_sgt.metrics.records import TasksRecord
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.parallel.rng import load_rng_state, rng_state


class TasksHook(MeasuringHook):
    """Runs the tasks with the structure that inference uses; of a run that keeps an average, with the average.

    Training goes on as if nothing had been: the random streams, which the harness seeds, are put back. Tasks that
    cannot be run after all are reported, and training goes on, too.

    Args:
        run: the harness on this model, for rank 0.
        interval: 0: only after the last step.
    """

    name = "tasks"

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        live: LiveModel,
        run: Callable[[LiveModel], Results],
        interval: int,
        schedule: Schedule,
        hub: MetricsHub,
        groups: ParallelGroups,
        ema: EmaHook | None = None,
    ) -> None:
        super().__init__(interval)
        self.engine = engine
        self.live = live
        self.run = run
        self.schedule = schedule
        self.hub = hub
        self.groups = groups
        self.ema = ema

    def measure(self, state: TrainState) -> None:
        start, module, was_training = time.perf_counter(), self.engine.module, self.engine.training
        streams = rng_state(self.groups.device)
        of_numpy = np.random.get_state()  # noqa: NPY002 (the harness seeds it)
        apply_plan(module, self.schedule.plan.inference())
        self.engine.eval()
        record: TasksRecord = {"step": state.step, "weights": "weights" if self.ema is None else "average"}
        with nullcontext() if self.ema is None else self.ema.swapped_in():
            try:
                record["results"] = self.live.together(lambda: self.run(self.live))
            except DataError as error:  # caught here: the weights must be swapped back
                record["failed"] = str(error)
        self.engine.train(was_training)
        apply_plan(module, self.schedule.plan)
        load_rng_state(streams, self.groups.device)
        np.random.set_state(of_numpy)  # noqa: NPY002
        record["seconds"] = time.perf_counter() - start
        self.hub.log("tasks", record)
