"""Bytes that a rank holds at once, for each stage of a pipeline: state, and micro-batches in flight.

A stage keeps the activations of all micro-batches that wait for their backward pass (``in_flight``). What it has
received is the input of its first layer, and counted there. What it has sent is freed with one chunk per stage;
interleaved, where messages overlap (``deallocate_pipeline_outputs`` is off), outputs are kept until their backward
pass, but for that of the last chunk, a loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from operator import mul

from megatron_sgt.arch.kernels import GPU, Kernels
from megatron_sgt.config import Config
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.in_flight import moments, most_in_flight
from megatron_sgt.planning.loop_cost import LoopMethod, choose_loop_method
from megatron_sgt.planning.memory import Activations, Part, Shape, activation_memory
from megatron_sgt.planning.pipeline import pipeline_layout
from megatron_sgt.planning.state_memory import State, state_memory


def stage_activations(
    config: Config,
    plan: LoopPlan,
    precision: str,
    stage: int,
    micro_batches: int,
    kernels: Kernels = GPU,
    tp_rank: int | None = None,
    method: LoopMethod | None = None,
) -> Activations:
    """Bytes of all micro-batches in flight on one rank of pipeline stage ``stage``, at the worst moment of a step.

    Without a pipeline those of the whole model and one micro-batch. Other arguments: see ``activation_memory``.
    """
    layout = pipeline_layout(config)
    first, last = 0, len(layout.counts) - 1
    parts = [
        Part(layers, stage + chunk * layout.size == first, stage + chunk * layout.size == last)
        for chunk, layers in enumerate(layout.chunks(stage))
    ]
    method = method or choose_loop_method(config)[0]
    if tp_rank is None:
        looping = {layer for layer, _ in plan.layers}.intersection(layout.layers(stage))
        size = config.parallel.tensor_model_parallel_size if looping else 1
        ranks = (
            stage_activations(config, plan, precision, stage, micro_batches, kernels, rank, method)
            for rank in range(size)
        )
        return max(ranks, key=lambda one: one.total)
    one = [activation_memory(config, plan, precision, kernels, tp_rank, method, part) for part in parts]
    if layout.size == 1:
        return one[0]
    # A gradient or an input that was received and waits; interleaved, for both directions at once.
    stream = Shape.of(config, precision, kernels).stream
    waiting = stream * min(2, layout.virtual_size)
    if layout.virtual_size > 1:
        one = [
            chunk if part.output else replace(chunk, layers=chunk.layers + stream)
            for chunk, part in zip(one, parts, strict=True)
        ]
    saved = [chunk.layers + chunk.loops + chunk.logits for chunk in one]
    flying, turn = max(
        moments(layout.size, layout.virtual_size, stage, micro_batches),
        key=lambda moment: sum(map(mul, moment[0], saved)) + one[moment[1]].transient,
    )
    return Activations(
        layers=sum(n * chunk.layers for n, chunk in zip(flying, one, strict=True)),
        loops=sum(n * chunk.loops for n, chunk in zip(flying, one, strict=True)),
        logits=sum(n * chunk.logits for n, chunk in zip(flying, one, strict=True)),
        kept=sum(chunk.kept for chunk in one),
        transient=one[turn].transient + waiting,
    )


@dataclass(frozen=True)
class RankMemory:
    """The fullest rank of one pipeline stage (without a pipeline there is stage 0 alone).

    ``in_flight``: micro-batches, interleaved: chunks, whose activations it holds at once.
    """

    stage: int
    in_flight: int
    state: State
    activations: Activations

    @property
    def total(self) -> int:
        return self.state.total + self.activations.total

    def rows(self) -> dict[str, int]:
        """Bytes by name, and their sum as ``total``."""
        parts = {
            field.name: getattr(part, field.name) for part in (self.state, self.activations) for field in fields(part)
        }
        return {**parts, "total": self.total}


def rank_memory(config: Config, plan: LoopPlan, world_size: int, precision: str) -> tuple[RankMemory, ...]:
    """What the fullest rank of each pipeline stage holds at the worst moment of a step of ``plan``.

    Raises:
        ConfigError: the batch or the ranks do not divide.
    """
    stages = range(config.parallel.pipeline_model_parallel_size)
    return tuple(_fullest(config, [plan], world_size, precision, stage) for stage in stages)


def fullest_rank(
    config: Config, plans: Iterable[LoopPlan], world_size: int, precision: str, limit: float = math.inf
) -> RankMemory:
    """The fullest rank of all at the worst of ``plans``; or the first one found that holds more than ``limit`` bytes.

    Raises:
        ConfigError: the batch or the ranks do not divide.
    """
    plans, found = list(plans), []
    for stage in range(config.parallel.pipeline_model_parallel_size):
        found.append(_fullest(config, plans, world_size, precision, stage))
        if found[-1].total > limit:
            break
    return max(found, key=lambda rank: rank.total)


def peak_memory(config: Config, plans: Iterable[LoopPlan], world_size: int, precision: str) -> int:
    """Bytes on the fullest rank of all at the worst of ``plans``."""
    return fullest_rank(config, plans, world_size, precision).total


def _fullest(config: Config, plans: Iterable[LoopPlan], world_size: int, precision: str, stage: int) -> RankMemory:
    layout, micro_batches = pipeline_layout(config), config.num_micro_batches(world_size)
    held, method = set(layout.layers(stage)), choose_loop_method(config)[0]
    # Plans that do the same on this stage are one.
    alike = {tuple((n, layer) for n, layer in plan.layers if n in held): plan for plan in plans}
    worst = (stage_activations(config, plan, precision, stage, micro_batches, method=method) for plan in alike.values())
    return RankMemory(
        stage,
        most_in_flight(layout.size, layout.virtual_size, stage, micro_batches),
        state_memory(config, world_size, precision, stage),
        max(worst, key=lambda one: one.total),
    )
