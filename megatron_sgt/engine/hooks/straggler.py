"""Which rank keeps the others waiting.

Collectives make the step times of all ranks equal: the fast ones wait inside them for the slow one. So each
rank measures what it does alone: the core attention of a few layers, which does not communicate (host time on
a CPU, between stream events on a GPU), and its waiting for data (on the host: on a GPU queued work may hide some
of it). One small gather per report compares the ranks.

The stages of a pipeline differ in load by design, and wait for each other between the measured pieces. So a rank is
compared with the ranks of its own pipeline stage; where it is alone on its stage, nothing is measured.
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.metrics import MetricsHub
from megatron_sgt.metrics.records import RanksRecord
from megatron_sgt.model.apply_plan import sgt_layers
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.parallel.stopwatch import Stopwatch

T = TypeVar("T")

TIMED_LAYERS = 4
"""Layers whose core attention is timed: enough to compare ranks, too few to slow a step."""
MIN_STEPS = 10
"""Fewest steps of a comparison."""
PATIENCE = 3
"""Comparisons in a row that must agree before a rank is named, or cleared."""


@dataclass
class LagRule:
    """Names a rank that was the worst, by more than ``threshold``, PATIENCE times in a row.

    Clears it after as many comparisons in a row below half of that. ``excess``: how far a rank is
    behind the median, as a fraction.
    """

    threshold: float
    named: int | None = None
    _suspect: int | None = None
    _streak: int = 0

    def judge(self, excess: Sequence[float]) -> int | None:
        """Take one comparison (a value per rank); return the rank that is newly named, None if there is none."""
        if self.named is not None:
            self._streak = self._streak + 1 if excess[self.named] < self.threshold / 2 else 0
            if self._streak >= PATIENCE:
                self.named, self._streak = None, 0
            return None
        worst = max(range(len(excess)), key=excess.__getitem__)
        if excess[worst] <= self.threshold:
            self._suspect, self._streak = None, 0
            return None
        self._streak = self._streak + 1 if worst == self._suspect else 1
        self._suspect = worst
        if self._streak < PATIENCE:
            return None
        self.named, self._suspect, self._streak = worst, None, 0
        return worst


def excess_over_median(values: Sequence[float], base: float | None = None) -> list[float]:
    """How far each value lies above the lower median, as a fraction of ``base`` (None: of the median)."""
    middle = statistics.median_low(values)
    base = middle if base is None else base
    return [(value - middle) / base if base > 0 else 0.0 for value in values]


def excess_in_stages(values: Sequence[float], stages: int, base: float | None = None) -> list[float]:
    """``excess_over_median`` within each of ``stages`` pipeline stages, whose ranks follow each other."""
    size = len(values) // stages
    parts = (values[first : first + size] for first in range(0, len(values), size))
    return [excess for part in parts for excess in excess_over_median(part, base)]


class StragglerHook(Hook):
    """Measures this rank and compares those of each pipeline stage, every ``interval`` steps (but at least MIN_STEPS).

    ``threshold`` 0, or a single rank on each stage: nothing is measured.
    """

    name = "straggler"

    def __init__(
        self,
        model: torch.nn.Module,
        interval: int,
        threshold: float,
        hub: MetricsHub,
        groups: ParallelGroups,
    ) -> None:
        self.interval = interval
        self.hub = hub
        self.groups = groups
        self.work = Stopwatch(groups.device)
        self.data = Stopwatch(torch.device("cpu"))
        self.rules = {"computing": LagRule(threshold), "waiting for data": LagRule(threshold)}
        self._steps: list[float] = []
        self.active = threshold > 0 and groups.world_size > groups.pp_size
        if not self.active:
            return
        layers = sgt_layers(model)
        for layer in layers[:: max(1, len(layers) // TIMED_LAYERS)]:
            core = layer.self_attention.core_attention
            core.register_forward_pre_hook(self._before)
            core.register_forward_hook(self._after)

    def _before(self, module: torch.nn.Module, inputs: Any) -> None:
        if module.training:
            self.work.start()

    def _after(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.work.stop()

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same micro-batches; waiting for them is measured."""
        iterator = iter(batches)
        while True:
            self.data.start()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.data.stop()
            yield batch

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if not self.active:
            return
        self.work.end_lap()
        self.data.end_lap()
        self._steps.append(result.seconds)
        if state.step % self.interval == 0 and len(self._steps) >= MIN_STEPS:
            self._compare(state.step)

    def _compare(self, step: int) -> None:
        # The median of the work, as one disturbed step says nothing; the mean of the waiting, which comes in bursts.
        own = [statistics.median(self.work.read()), statistics.fmean(self.data.read())]
        seconds = statistics.fmean(self._steps)
        self._steps = []
        mine = torch.tensor([own], dtype=torch.float64, device=self.groups.device)
        table = [torch.empty_like(mine) for _ in range(self.groups.world_size)]
        dist.all_gather(table, mine)
        work, data = torch.cat(table).T.tolist()
        record: RanksRecord = {
            "step": step,
            "step_time_s": seconds,
            "work_s": [round(value, 6) for value in work],
            "data_wait_s": [round(value, 6) for value in data],
        }
        lags = {
            "computing": excess_in_stages(work, self.groups.pp_size),
            "waiting for data": excess_in_stages(data, self.groups.pp_size, base=seconds),
        }
        for what, excess in lags.items():
            rank = self.rules[what].judge(excess)
            if rank is not None:
                hosts: list[str] = [""] * self.groups.world_size
                dist.all_gather_object(hosts, socket.gethostname())  # all ranks have come to the same result
                record |= {"lagging_rank": rank, "host": hosts[rank], "what": what, "excess": excess[rank]}
        self.hub.log("ranks", record)
