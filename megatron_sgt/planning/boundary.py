"""A model of the seconds between two stages, in which nothing is trained. Not calibrated: its rates are assumed.

    save     bytes of a checkpoint of the old model / (nodes · storage), and a rank's share of them / HOST, the
             mean of all: each process checks what it writes on one core
    rebuild  START, in which the old engine goes and the new one comes, and the initial weights of the new model, which
             every rank draws whole on its device, at the memory's bandwidth
    read     what a node needs of the old checkpoint / storage; what one rank makes of it / HOST; and the new entries
             that it draws on its CPU / DRAWN

With n old and m new parameters, q quantities of 4 bytes (weights; two moments unless they begin anew; an average of
the weights if there is one) and dp data-parallel ranks, of which k are on a node, a rank makes whole tensors of

    ZeRO 0, 3    4·q·m bytes, all of them: it has a part of every tensor
    ZeRO 1, 2    4·q·m / dp, those that lie in its share

and a node reads 4·q times the smaller of n and of what its ranks make: m, or m·k / dp at ZeRO 1 and 2. Ranks of a node
read a file once. The first save of the new stage is not part of it. A rank of a pipeline makes and draws tensors of its
own pipeline stage alone: m is what the one with most parameters has, and a node reads for all that its ranks belong to.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sgt.planning.parameters import checkpoint_bytes, parameter_count, stage_parameter_count
from megatron_sgt.planning.step_time import Machine
from megatron_sgt.stages.maps import maps_of
from megatron_sgt.stages.stages import Stage

START = 15.0
"""Seconds that no bandwidth explains: imports are there, but DeepSpeed and the kernels start anew."""
HOST = 1e9
"""Bytes per second that a process hashes, merges or copies on one core."""
DRAWN = 2e8
"""Normal numbers per second that a process draws on one core."""
_FP32 = 4


@dataclass(frozen=True)
class BoundaryTime:
    """Seconds of one boundary by component."""

    save: float
    rebuild: float
    read: float

    @property
    def total(self) -> float:
        return self.save + self.rebuild + self.read


def boundary_time(before: Stage, after: Stage, world_size: int, machine: Machine, precision: str) -> BoundaryTime:
    """Model the boundary at which ``before`` grows into ``after``, on ``world_size`` ranks."""
    assert after.grown is not None
    config, tensor = before.config, before.config.parallel.tensor_model_parallel_size
    nodes = max(1, -(-world_size // machine.gpus_per_node))
    replicas = config.data_parallel_size(world_size)
    shards_on_node = max(1, min(world_size, machine.gpus_per_node) // tensor)
    on_node, parts_on_node = min(replicas, shards_on_node), max(1, shards_on_node // replicas)
    apart = config.zero_stage_on(world_size, precision) in (1, 2)
    saved = checkpoint_bytes(config, precision)
    old, new = (parameter_count(stage.config.model) for stage in (before, after))
    stages = range(config.parallel.pipeline_model_parallel_size)
    held = max(stage_parameter_count(after.config, stage) for stage in stages)
    carried = after.grown.carried(before.last, after.config)
    per_parameter = _FP32 * (1 + 2 * carried.keeps_moments + bool(config.train.ema_decay))
    made = held / replicas if apart else held
    needed = min(old, made * (on_node if apart else 1) * parts_on_node)
    share = made / new
    return BoundaryTime(
        save=saved / (nodes * machine.storage) + saved / world_size / HOST,
        rebuild=START + _FP32 * held / machine.gpu.memory_bandwidth,
        read=per_parameter * (needed / machine.storage + made / HOST) + share * _drawn(after) / DRAWN,
    )


def _drawn(stage: Stage) -> int:
    """Elements of the new model's tensors in which some entry begins with an initial value."""
    assert stage.grown is not None
    tensors = (tensor for one in maps_of(stage.grown.growth).values() for tensor in one.tensors)
    return sum(
        _elements(tensor.shape)
        for tensor in tensors
        if not tensor.zero and any(axis is not None and len(axis.new) and not axis.zero for axis in tensor.axes)
    )


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
