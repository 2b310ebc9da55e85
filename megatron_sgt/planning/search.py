"""The fastest layouts of a run on a given number of GPUs that fit over the whole of its growth. Pure.

A layout is a tensor-parallel size (inside a node), pipeline and virtual size, ZeRO stage, micro-batch, granularity of
recompute and sequence parallelism. The batch, the model and the optimizer stay: every layout trains the same run. Each
is made into a configuration and validated, so that no rule is known here; what the rules refuse is no layout.

Layouts are ranked by the time of a step (``step_time``) of the structure that the run ends with, and the best one of
each pair of tensor-parallel and pipeline sizes is told. Three orders of that model save work:

* the same sizes with more recompute, or with ZeRO 2 in place of a lower stage, are not faster, so that these are only
  looked at where less does not fit (ZeRO 3 is, where a step has one micro-batch);
* sequence parallelism sends the same bytes and keeps less, so that it is on wherever the rules allow it (its norms send
  a few small messages more, which only count where a step is short);
* no step takes less than its products at the peak and the smallest bubble (``_least_seconds``), so that layouts
  are opened in that order, and those that come after the last one told are never opened.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from megatron_sgt.config import Config
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.advice import RECOMPUTE, changed
from megatron_sgt.planning.flops import step_flops
from megatron_sgt.planning.hardware import USABLE
from megatron_sgt.planning.loop_cost import choose_loop_method
from megatron_sgt.planning.pipeline import pipeline_layout
from megatron_sgt.planning.rank_memory import RankMemory, fullest_rank, peak_memory
from megatron_sgt.planning.stages import StagePlan
from megatron_sgt.planning.state_memory import state_memory
from megatron_sgt.planning.step_time import Machine, StepTime, step_time
from megatron_sgt.planning.structure import final_plan

TOLD = 8
"""Layouts that a search tells."""
FITS = 0.95
"""Share of the usable memory that a layout may fill: the memory told may be off by the rest."""
MOST_VIRTUAL = 4
"""The most chunks of a stage that are tried."""
LEAST_GAIN = 0.01
"""Share of a step that more chunks must be able to save."""
MOST_SEQUENCES = 16
"""The largest micro-batch that is tried, but for the run's own."""
SHARED_STATE, SHARED_WEIGHTS = (0, 1, 2), (3,)
"""ZeRO stages, each group from the fastest to the smallest."""


@dataclass(frozen=True)
class Layout:
    """What is searched."""

    tensor: int
    pipeline: int
    virtual: int
    micro_batch_size: int
    sequence_parallel: bool
    zero_stage: int
    recompute: str

    def changes(self) -> dict[str, Any]:
        """As settings."""
        return {
            "parallel.tensor_model_parallel_size": self.tensor,
            "parallel.sequence_parallel": self.sequence_parallel,
            "parallel.pipeline_model_parallel_size": self.pipeline,
            "parallel.virtual_pipeline_model_parallel_size": self.virtual,
            "parallel.pipeline_model_parallel_layout": "auto",
            "parallel.zero_stage": self.zero_stage,
            "train.micro_batch_size": self.micro_batch_size,
            "train.recompute_granularity": self.recompute,
            "train.recompute_layers": None,
        }


@dataclass(frozen=True)
class Run:
    """What stays the same: the run's stages, the machine, and the number of ranks."""

    stages: Sequence[StagePlan]
    world_size: int
    machine: Machine
    precision: str
    cuts: dict[tuple[Any, ...], list[tuple[int, ...]]] = field(default_factory=dict, compare=False)

    @property
    def config(self) -> Config:
        """Of the last stage, whose steps are the longest."""
        return self.stages[-1].config

    @property
    def limit(self) -> float:
        """Usable bytes."""
        return USABLE * self.machine.gpu.memory

    @property
    def room(self) -> float:
        """Bytes that a layout may take."""
        return FITS * self.limit

    @cached_property
    def least_operations(self) -> float:
        """Operations of a step that any layout needs on each rank."""
        sequences = self.config.train.global_batch_size
        flops = step_flops(self.config.model, final_plan(self.config), sequences, pairs=self.stages[-1].pairs)
        return (3 * flops.linear + 3.5 * flops.attention / 2) / self.world_size


@dataclass
class Candidate:
    """A layout that the rules accept: the run's configuration with it, one for each stage of the run."""

    run: Run
    layout: Layout
    configs: list[Config]

    @property
    def config(self) -> Config:
        return self.configs[-1]

    @cached_property
    def cut(self) -> list[Config]:
        """``configs`` with the cut that ``auto`` finds, for which the formulas ask many times.

        It is the same for every micro-batch, since all costs are in proportion to it.
        """
        layout = self.layout
        if layout.pipeline == 1:
            return self.configs
        key = layout.tensor, layout.sequence_parallel, layout.pipeline, layout.virtual, layout.recompute
        if key not in self.run.cuts:
            self.run.cuts[key] = [pipeline_layout(config).counts for config in self.configs]
        return [
            config.model_copy(
                update={"parallel": config.parallel.model_copy(update={"pipeline_model_parallel_layout": counts})}
            )
            for config, counts in zip(self.configs, self.run.cuts[key], strict=True)
        ]

    def seconds(self, plan: LoopPlan, config: Config) -> StepTime:
        """Of one step of ``plan``."""
        run, method = self.run, choose_loop_method(config)[0]
        return step_time(config, plan, run.world_size, run.machine, run.precision, method, run.stages[-1].pairs)

    @cached_property
    def time(self) -> StepTime:
        """Of one step of the structure that the run ends with."""
        return self.seconds(final_plan(self.config, together=True), self.cut[-1])

    @cached_property
    def fits(self) -> bool:
        """Whether every rank has room for what it needs at every moment of the run."""
        run = self.run
        for one, config in zip(run.stages, self.cut, strict=True):
            stages = range(self.layout.pipeline)
            if max(state_memory(config, run.world_size, run.precision, stage).total for stage in stages) > run.room:
                return False
            if fullest_rank(config, one.plans, run.world_size, run.precision, run.room).total > run.room:
                return False
        return True

    @cached_property
    def fullest(self) -> RankMemory:
        """The fullest rank at the worst moment of the run."""
        run = self.run
        each = (
            fullest_rank(config, one.plans, run.world_size, run.precision)
            for one, config in zip(run.stages, self.cut, strict=True)
        )
        return max(each, key=lambda rank: rank.total)

    def peak_before_growth(self) -> int:
        """Bytes on the fullest rank in the first steps."""
        run = self.run
        return peak_memory(self.cut[0], [run.stages[0].stretches[0].plan], run.world_size, run.precision)

    def whole_run(self) -> tuple[float, int]:
        """(seconds, tokens) of all steps, each of the structure that it executes; as long as its batch is large."""
        seconds, tokens = 0.0, 0
        for one, config in zip(self.run.stages, self.cut, strict=True):
            each = {plan: self.seconds(plan, config).total / config.tokens_per_step for plan in one.plans}
            seconds += sum(each[part.plan] * config.tokens_between(part.first, part.last) for part in one.stretches)
            tokens += one.tokens
        return seconds, tokens


@dataclass
class Search:
    """What was found.

    Attributes:
        best: those that fit, the fastest first, one of each pair of tensor-parallel and pipeline sizes.
        excluded: of those that would be faster than all of ``best`` and do not fit the one that needs least.
        accepted: how many layouts the rules accept, without those of more recompute or a higher ZeRO stage.
    """

    run: Run
    best: list[Candidate] = field(default_factory=list)
    excluded: Candidate | None = None
    accepted: int = 0


def search(run: Run, told: int = TOLD) -> Search:
    """The ``told`` fastest layouts of ``run``.

    Raises:
        ConfigError: no layout is accepted; with what the rules said of the last one.
    """
    found, number = Search(run), itertools.count()
    queue: list[tuple[float, int, Candidate, bool]] = []
    for candidate in _bases(run):
        heapq.heappush(queue, (_least_seconds(candidate), next(number), candidate, False))
    found.accepted, pairs, faster = len(queue), set(), []
    while queue and len(found.best) < told:
        seconds, _, candidate, is_open = heapq.heappop(queue)
        pair = candidate.layout.tensor, candidate.layout.pipeline
        if pair in pairs:
            continue
        if seconds < candidate.time.total:  # a bound: come back at its own time
            heapq.heappush(queue, (candidate.time.total, next(number), candidate, is_open))
        elif is_open or candidate.fits:
            pairs.add(pair)
            found.best.append(candidate)
        else:
            if not found.best:
                faster.append(candidate)
            for other in _smaller(candidate):
                heapq.heappush(queue, (other.time.total, next(number), other, True))
    if not found.best:
        faster = [other for one in faster for other in _variants(one)]
    found.excluded = min(faster, key=lambda one: one.fullest.total, default=None)
    return found


def _bases(run: Run) -> list[Candidate]:
    """All accepted layouts at the least recompute, at the lowest ZeRO stage and at ZeRO 3."""
    found: list[Candidate] = []
    refused: list[ConfigError] = []
    for (tensor, pipeline, virtual, micro), stages in itertools.product(_sizes(run), (SHARED_STATE, SHARED_WEIGHTS)):
        for sharded, stage in itertools.product((True, False), stages):
            try:
                found.append(_candidate(run, Layout(tensor, pipeline, virtual, micro, sharded, stage, RECOMPUTE[0])))
                break
            except ConfigError as error:
                refused.append(error)
    if not found:
        raise ConfigError(f"no layout of {run.world_size} GPUs is accepted; of the last one: {refused[-1]}")
    return found


def _sizes(run: Run) -> Iterator[tuple[int, int, int, int]]:
    """(tensor parallel, pipeline, virtual, micro-batch) for the rules to judge."""
    layers, train = run.config.model.num_layers, run.config.train
    for tensor, pipeline in itertools.product(_divisors(run.machine.gpus_per_node), _divisors(run.world_size)):
        if pipeline > layers or run.world_size % (tensor * pipeline):
            continue
        per_rank = train.global_batch_size * tensor * pipeline // run.world_size
        powers = (2**n for n in range(min(per_rank, MOST_SEQUENCES).bit_length()))
        for micro in sorted({train.micro_batch_size, *powers}):
            for virtual in _chunks(pipeline, layers, per_rank // micro):
                yield tensor, pipeline, virtual, micro


def _candidate(run: Run, layout: Layout) -> Candidate:
    """Raises: ConfigError where the rules refuse it."""
    configs = []
    for one in run.stages:
        configs.append(changed(one.config, {**layout.changes(), "train.precision": run.precision}))
        configs[-1].num_micro_batches(run.world_size)
    return Candidate(run, layout, configs)


def _smaller(base: Candidate) -> Iterator[Candidate]:
    """Where ``base`` does not fit: at each ZeRO stage the least recompute that does, if less than at the one before."""
    least = len(RECOMPUTE)
    for candidate in _variants(base):
        recompute = RECOMPUTE.index(candidate.layout.recompute)
        if recompute < least and candidate.fits:
            least = recompute
            yield candidate


def _variants(base: Candidate) -> Iterator[Candidate]:
    """``base`` with more recompute, then at the next ZeRO stage with little, and so on."""
    lowest = base.layout.zero_stage
    for stage in SHARED_WEIGHTS if lowest in SHARED_WEIGHTS else SHARED_STATE[lowest:]:
        for recompute in RECOMPUTE:
            with contextlib.suppress(ConfigError):
                yield _candidate(base.run, replace(base.layout, zero_stage=stage, recompute=recompute))


def _least_seconds(candidate: Candidate) -> float:
    run, layout = candidate.run, candidate.layout
    micro_batches = candidate.config.num_micro_batches(run.world_size)
    # Fills with the first chunk of each stage, which may have a single layer.
    fill = 1.0 if layout.virtual == 1 else layout.pipeline / candidate.config.model.num_layers
    bubble = (layout.pipeline - 1) * fill / micro_batches
    rate = run.machine.gpu.peak(run.precision) * run.machine.kernel_efficiency
    return run.least_operations * (1 + bubble) / rate


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _chunks(pipeline: int, layers: int, micro_batches: int) -> Iterator[int]:
    """Powers of two, as long as more chunks could still shorten the step by LEAST_GAIN."""
    virtual = 1
    while virtual <= min(MOST_VIRTUAL, layers // pipeline):
        yield virtual
        if (pipeline - 1) / (virtual * max(1, micro_batches)) < LEAST_GAIN:
            return
        virtual *= 2
