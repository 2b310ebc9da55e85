"""The few collectives outside Megatron-Core and DeepSpeed, on small host-side values."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.parallel.together import wait_for_all


def mean_over_data_parallel(values: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """Mean of ``values`` (any shape, replicated over tensor-parallel ranks) over the data-parallel group."""
    if groups.dp_size > 1:
        dist.all_reduce(values, group=groups.dp_group)
        values /= groups.dp_size
    return values


def largest(value: int, groups: ParallelGroups) -> int:
    """The largest ``value`` of all ranks, exact up to 2^31; a single process does not touch its device."""
    if groups.world_size == 1:
        return value
    held = torch.tensor(value, dtype=torch.int32, device=groups.device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return int(held)


def any_rank(flag: bool, groups: ParallelGroups) -> bool:
    """True on every rank if ``flag`` is true on at least one."""
    return bool(largest(int(flag), groups))


def broadcast_object(value: Any, groups: ParallelGroups) -> Any:
    """Rank 0's ``value`` on every rank. For rare events only: it pickles."""
    if groups.world_size == 1:
        return value
    holder = [value if groups.is_main else None]
    dist.broadcast_object_list(holder, src=0, device=groups.device)
    return holder[0]


def barrier(groups: ParallelGroups) -> None:
    """Wait until every rank has come here, however long one takes."""
    if groups.world_size > 1:
        wait_for_all()
        dist.barrier(device_ids=[groups.device.index] if groups.device.index is not None else None)
