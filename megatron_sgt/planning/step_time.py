"""A model of the time of one training step, component by component. Not calibrated: its efficiencies are assumed.

    compute     operations that the step needs (causal products at half, recompute included) on the rank that has
                most, over peak · kernel_efficiency
    elementwise bytes that the operations between matrix products move over the memory bandwidth: each byte kept
                for the backward pass is written and read, read again, and its gradient written and read (5 times);
                a recomputed one is written and read once more
    traffic     Σ wire bytes / (bandwidth · link_efficiency) + calls · latency · log2(ranks)
    optimizer   28 bytes per parameter of the rank's share (fp32 master copy and two moments read and written,
                gradient read) over the memory bandwidth

    bubble      what the largest stage of a pipeline waits while others fill and drain it

Stage p of a pipeline takes t_p for one of M micro-batches: compute, elementwise, traffic of its layers and what it
sends to its neighbours. M of them take M · max t_p + Σ t_p - max t_p; interleaved, where a stage's time is shared out
to its chunks by their operations, as long as their passes take one after another (``pipeline.pipeline_time``). With
chunks of equal time the bubble is (P - 1) / (V · M + P - 1) of that. Optimizer and data-parallel traffic come after it,
on all stages at once: those of the stage that needs longest.

Nothing overlaps with anything else. Tensor-parallel groups lie inside a node. A data-parallel group that spans nodes
has the network adapters of all its ranks in a node, a rank that sends to another stage one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_sgt.arch.attended_pairs import AttendedPairs
from megatron_sgt.config import Config
from megatron_sgt.config.pipeline import PipelineLayout
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.hardware import Gpu
from megatron_sgt.planning.layer_cost import layer_costs, output_cost
from megatron_sgt.planning.memory import Part, activation_memory
from megatron_sgt.planning.parameters import stage_parameter_count
from megatron_sgt.planning.pipeline import cut_cost, pipeline_layout, pipeline_time
from megatron_sgt.planning.tensor_traffic import LoopMethod, Transfer
from megatron_sgt.planning.traffic import group_sizes, step_traffic

OPTIMIZER_BYTES = 28
"""Read and written per parameter by AdamW in fp32."""
NOT_CALIBRATED = "not calibrated"
"""The mark of every figure that comes from here, wherever it is printed."""
LOOP_PARTS = ("loops", "loops in the window", "kept weights", "block loops")


@dataclass(frozen=True)
class Machine:
    """``gpus_per_node`` devices per node, and how much of their data sheets' figures is reached.

    ``kernel_efficiency``: of the peak, by matrix products and attention;
    ``link_efficiency``: of a link's bandwidth, by a collective; ``latency``: seconds that a collective of two ranks
    takes in any case, more by log2(ranks); ``storage``: bytes per second between a node and the checkpoints' folder.
    """

    gpu: Gpu
    gpus_per_node: int = 8
    kernel_efficiency: float = 0.65
    link_efficiency: float = 0.8
    latency: float = 10e-6
    storage: float = 2e9


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by component, on the pipeline stage that takes longest.

    ``pipeline``: messages between stages, tied embeddings too; ``bubble``: waiting for other stages.
    """

    compute: float
    elementwise: float
    tensor_parallel: float
    data_parallel: float
    optimizer: float
    loop_compute: float
    loop_traffic: float
    pipeline: float = 0.0
    bubble: float = 0.0

    @property
    def loops(self) -> float:
        return self.loop_compute + self.loop_traffic

    @property
    def total(self) -> float:
        ordinary = self.compute + self.elementwise + self.optimizer
        return ordinary + self.tensor_parallel + self.data_parallel + self.loops + self.pipeline + self.bubble


def step_time(
    config: Config,
    plan: LoopPlan,
    world_size: int,
    machine: Machine,
    precision: str,
    method: LoopMethod,
    pairs: AttendedPairs | None = None,
) -> StepTime:
    """Model one optimizer step of ``plan`` on ``world_size`` ranks. ``pairs``: as in ``flops.step_flops``."""
    rank = _Rank(config, plan, world_size, machine, precision, method, pairs)
    layout = pipeline_layout(config)
    stages = [rank.passes(stage) for stage in range(layout.size)]
    largest = max(stages, key=lambda one: one.total)
    after = max((rank.update(stage) for stage in range(layout.size)), key=lambda one: one.total)
    return replace(
        largest,
        bubble=_waiting(config, plan, [one.total for one in stages], config.num_micro_batches(world_size)),
        pipeline=largest.pipeline + after.pipeline,
        data_parallel=after.data_parallel,
        optimizer=after.optimizer,
    )


def _waiting(config: Config, plan: LoopPlan, stages: list[float], micro_batches: int) -> float:
    """Seconds that the largest of ``stages`` waits, which take so long for all micro-batches."""
    cost = cut_cost(config, plan, pipeline_layout(config))
    if cost.size == 1:
        return 0.0
    chunks = [
        stages[n % cost.size] * operations / cost.stages[n % cost.size] for n, operations in enumerate(cost.chunks)
    ]
    return pipeline_time(chunks, cost.size, micro_batches) / micro_batches - max(stages)


@dataclass(frozen=True)
class _Rank:
    """What a rank of any pipeline stage does in a step."""

    config: Config
    plan: LoopPlan
    world_size: int
    machine: Machine
    precision: str
    method: LoopMethod
    pairs: AttendedPairs | None

    def passes(self, stage: int) -> StepTime:
        """Forward and backward passes of all micro-batches, one after another."""
        config, gpu = self.config, self.machine.gpu
        rate = gpu.peak(self.precision) * self.machine.kernel_efficiency
        micro_batches, layout = config.num_micro_batches(self.world_size), pipeline_layout(config)
        ranks = range(config.parallel.tensor_model_parallel_size if self.plan.layers else 1)
        costs = [layer_costs(config, self.plan, self.method, rank, self.pairs) for rank in ranks]
        ordinary = sum(costs[0][layer].ordinary for layer in layout.layers(stage))
        ordinary += output_cost(config) if stage == layout.size - 1 else 0.0
        loops = max(sum(layers[layer].loops for layer in layout.layers(stage)) for layers in costs)
        sent = self._sent(stage)
        moved, moved_by_loops = self._elementwise_bytes(layout, stage)
        return StepTime(
            compute=ordinary * micro_batches / rate,
            elementwise=moved * micro_batches / gpu.memory_bandwidth,
            tensor_parallel=sum(time for one, time in sent if one.group == "tensor" and one.part not in LOOP_PARTS),
            data_parallel=0.0,
            optimizer=0.0,
            loop_compute=(loops / rate + moved_by_loops / gpu.memory_bandwidth) * micro_batches,
            loop_traffic=sum(time for one, time in sent if one.part in LOOP_PARTS),
            pipeline=sum(time for one, time in sent if one.group == "pipeline"),
        )

    def update(self, stage: int) -> StepTime:
        """What comes once, when all gradients are there."""
        config = self.config
        share = stage_parameter_count(config, stage, config.parallel.tensor_model_parallel_size)
        ranks = config.data_parallel_size(self.world_size) if config.parallel.zero_stage else 1
        sent = self._sent(stage)
        return StepTime(
            compute=0.0,
            elementwise=0.0,
            tensor_parallel=0.0,
            data_parallel=sum(time for one, time in sent if one.group == "data"),
            optimizer=share / ranks * OPTIMIZER_BYTES / self.machine.gpu.memory_bandwidth,
            loop_compute=0.0,
            loop_traffic=0.0,
            pipeline=sum(time for one, time in sent if one.group == "tied"),
        )

    def _sent(self, stage: int) -> list[tuple[Transfer, float]]:
        """Everything that a rank of ``stage`` sends in a step, and the seconds that it takes."""
        config, size = self.config, self.world_size
        sent = step_traffic(config, self.plan, size, self.precision, self.method, pipeline_stage=stage)
        return [(one, _seconds(one, config, size, self.machine)) for one in sent]

    def _elementwise_bytes(self, layout: PipelineLayout, stage: int) -> tuple[float, float]:
        """(ordinary, loops): read and written between matrix products for a micro-batch."""
        times = 7 if self.config.train.recompute_granularity == "full" else 5
        train = self.config.train.model_copy(update={"recompute_granularity": "none", "recompute_layers": None})
        config = self.config.model_copy(update={"train": train})
        ordinary = loops = 0
        for number, layers in enumerate(layout.chunks(stage)):
            first = stage == 0 and number == 0
            last = stage == layout.size - 1 and number == layout.virtual_size - 1
            kept = activation_memory(
                config, self.plan, self.precision, method=self.method, part=Part(layers, first, last)
            )
            ordinary += kept.layers + kept.logits
            loops += kept.loops
        return ordinary * times, loops * times


def _seconds(item: Transfer, config: Config, world_size: int, machine: Machine) -> float:
    tensor, sizes = config.parallel.tensor_model_parallel_size, group_sizes(config, world_size)
    ranks = sizes[item.group]
    if ranks == 1:
        return 0.0
    span = {"tensor": tensor, "data": tensor * sizes["data"]}.get(item.group, world_size)  # from its first rank on
    if min(span, world_size) <= machine.gpus_per_node:
        bandwidth = machine.gpu.link
    else:
        adapters = 1 if item.kind in ("send", "broadcast") else max(1, machine.gpus_per_node // tensor)
        bandwidth = min(machine.gpu.link, machine.gpu.network * adapters)
    waiting = item.calls * machine.latency * (1.0 if item.kind == "send" else math.log2(ranks))
    return item.wire_bytes(ranks) / (bandwidth * machine.link_efficiency) + waiting
