"""A model of the time of one training step, component by component. Not calibrated: its efficiencies are assumed.

    compute     operations that the step needs (causal products at half, recompute included) on the rank that has
                most, over peak · kernel_efficiency
    elementwise bytes that the operations between matrix products move over the memory bandwidth: each byte kept
                for the backward pass is written and read, read again, and its gradient written and read (5 times);
                a recomputed one is written and read once more
    traffic     Σ wire bytes / (bandwidth · link_efficiency) + calls · latency · log2(ranks)
    optimizer   28 bytes per parameter of the rank's share (fp32 master copy and two moments read and written,
                gradient read) over the memory bandwidth

Nothing overlaps with anything else. Tensor-parallel groups lie inside a node. A data-parallel group that spans nodes
has the network adapters of all its ranks in a node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sgt.arch.flops import Flops
from megatron_sgt.config import Config
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.planning.flops import pass_flops, step_flops
from megatron_sgt.planning.hardware import Gpu
from megatron_sgt.planning.loop_cost import loop_flops
from megatron_sgt.planning.memory import activation_memory
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.planning.traffic import LoopMethod, Transfer, group_sizes, step_traffic

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
    """Seconds of one optimizer step by component."""

    compute: float
    elementwise: float
    tensor_parallel: float
    data_parallel: float
    optimizer: float
    loop_compute: float
    loop_traffic: float

    @property
    def loops(self) -> float:
        return self.loop_compute + self.loop_traffic

    @property
    def total(self) -> float:
        ordinary = self.compute + self.elementwise + self.optimizer
        return ordinary + self.tensor_parallel + self.data_parallel + self.loops


def step_time(
    config: Config, plan: LoopPlan, world_size: int, machine: Machine, precision: str, method: LoopMethod
) -> StepTime:
    """Model one optimizer step of ``plan`` on ``world_size`` ranks."""
    rate = machine.gpu.peak(precision) * machine.kernel_efficiency
    empty = LoopPlan.empty(config.model.num_layers)
    ordinary = step_flops(config.model, empty, config.train.global_batch_size)
    again = sum(_recomputed(config, layer) for layer in range(config.model.num_layers))
    transfers = step_traffic(config, plan, world_size, precision, method)
    looping = [item for item in transfers if item.part in LOOP_PARTS]
    others = [item for item in transfers if item.part not in LOOP_PARTS]
    moved, moved_by_loops = _elementwise_bytes(config, plan, world_size, precision, method)
    count = parameter_count(config.model, config.parallel.tensor_model_parallel_size)
    share = count / (config.data_parallel_size(world_size) if config.parallel.zero_stage else 1)
    return StepTime(
        compute=(_needed(ordinary) + again) / world_size / rate,
        tensor_parallel=sum(_seconds(i, config, world_size, machine) for i in others if i.group != "data"),
        data_parallel=sum(_seconds(i, config, world_size, machine) for i in others if i.group == "data"),
        optimizer=share * OPTIMIZER_BYTES / machine.gpu.memory_bandwidth,
        elementwise=moved / machine.gpu.memory_bandwidth,
        loop_compute=_loop_operations(config, plan, world_size, method) / rate
        + moved_by_loops / machine.gpu.memory_bandwidth,
        loop_traffic=sum(_seconds(item, config, world_size, machine) for item in looping),
    )


def _elementwise_bytes(
    config: Config, plan: LoopPlan, world_size: int, precision: str, method: LoopMethod
) -> tuple[float, float]:
    """(ordinary, loops): read and written between matrix products in a step."""
    granularity = config.train.recompute_granularity
    times = 7 if granularity == "full" else 5
    train = config.train.model_copy(update={"recompute_granularity": "none", "recompute_layers": None})
    kept = activation_memory(config.model_copy(update={"train": train}), plan, precision, method=method)
    steps = times * config.num_micro_batches(world_size)
    return (kept.layers + kept.logits) * steps, kept.loops * steps


def _needed(flops: Flops) -> float:
    return 3 * flops.linear + 3.5 * flops.attention / 2


def _recomputed(config: Config, layer: int) -> float:
    one = pass_flops(config.model, layer, config.train.global_batch_size)
    if layer in config.recomputed_layers("selective"):
        return one.attention.attention / 2
    if layer in config.recomputed_layers("full"):
        return one.attention.linear + one.attention.attention / 2 + one.mlp.linear
    return 0.0


def _loop_operations(config: Config, plan: LoopPlan, world_size: int, method: LoopMethod) -> float:
    ranks = config.parallel.tensor_model_parallel_size
    micro_batches = config.num_micro_batches(world_size)
    per_rank = [
        sum(_layer_loops(config, layer, index, rank, method) for index, layer in enumerate(plan))
        for rank in range(ranks)
    ]
    return max(per_rank) * micro_batches


def _layer_loops(config: Config, layer: LayerPlan, index: int, rank: int, method: LoopMethod) -> float:
    train, ranks = config.train, config.parallel.tensor_model_parallel_size
    full = index in config.recomputed_layers("full")
    total = 0.0
    one = pass_flops(config.model, index, train.micro_batch_size)
    if layer.block_loops:
        whole = one.attention + one.mlp
        total += layer.block_loops * (_needed(whole) + full * (whole.linear + whole.attention / 2)) / ranks
    if layer.phase == "window":
        attention = one.attention
        again = full * (attention.linear + attention.attention / 2)
        total += layer.loops * (_needed(attention) + again) / ranks
    elif layer.phase == "sparse":
        flops = loop_flops(config, method, layer.kept_heads, rank)
        again = full * (flops.linear_forward + flops.visible * flops.attention_forward)
        total += layer.loops * (flops.needed + again)
    return total


def _seconds(item: Transfer, config: Config, world_size: int, machine: Machine) -> float:
    tensor = config.parallel.tensor_model_parallel_size
    ranks = group_sizes(config, world_size)[item.group]
    if ranks == 1:
        return 0.0
    if world_size <= machine.gpus_per_node or (item.group == "tensor" and tensor <= machine.gpus_per_node):
        bandwidth = machine.gpu.link
    else:
        adapters = max(1, machine.gpus_per_node // tensor)
        bandwidth = min(machine.gpu.link, machine.gpu.network * adapters)
    waiting = item.calls * machine.latency * math.log2(ranks)
    return item.wire_bytes(ranks) / (bandwidth * machine.link_efficiency) + waiting
