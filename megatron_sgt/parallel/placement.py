"""Checks where ranks are placed: no two on one GPU, tensor-parallel groups inside a host, no tight host limits.

Every rank publishes its place in the store; rank 0 checks all of them.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_sgt.errors import ConfigError
from megatron_sgt.parallel.collectives import barrier
from megatron_sgt.parallel.device import identity
from megatron_sgt.parallel.groups import ParallelGroups

ENOUGH = 2**30
"""Bytes of /dev/shm that suffice for NCCL and the data workers of a host, as NCCL's manual recommends."""
SHOWN = 3
"""Hosts or groups that a sentence names; it counts the others."""


@dataclass(frozen=True)
class Seat:
    """The place of one rank. Sizes are in bytes."""

    host: str
    device: str | None = None
    """What ``parallel.device.identity`` says."""
    lockable: int | None = None
    """Memory that the process may lock; None without a limit."""
    shared: int | None = None
    """Size of /dev/shm; None where there is none."""


def own_seat(device: torch.device) -> Seat:
    """This process's."""
    lockable = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    try:
        disk = os.statvfs("/dev/shm")
        shared = disk.f_frsize * disk.f_blocks
    except OSError:
        shared = None
    unlimited = lockable == resource.RLIM_INFINITY
    return Seat(socket.gethostname(), identity(device), None if unlimited else lockable, shared)


def shared_device(seats: Sequence[Seat]) -> str | None:
    """What is wrong, if two ranks have the same GPU. ``seats`` are in the order of the ranks."""
    first: dict[str, int] = {}
    for rank, seat in enumerate(seats):
        if seat.device is None:
            continue
        other = first.setdefault(seat.device, rank)
        if other != rank:
            return (
                f"rank {other} and rank {rank} on {seat.host} have the same GPU ({seat.device}): start one rank per "
                "GPU, and let every rank see all of the host's GPUs or one of its own (srun --gpus-per-task=1)"
            )
    return None


def spanning_groups(hosts: Sequence[str], tensor_parallel: int) -> list[tuple[int, list[str]]]:
    """(first rank, its hosts in order) of every tensor-parallel group that has ranks on several hosts.

    Megatron-Core puts consecutive ranks into a group. ``hosts``: the host of every rank.
    """
    groups = ((r, list(dict.fromkeys(hosts[r : r + tensor_parallel]))) for r in range(0, len(hosts), tensor_parallel))
    return [(rank, names) for rank, names in groups if len(names) > 1]


def advice(seats: Sequence[Seat], tensor_parallel: int) -> list[str]:
    """What is legal but slow, or likely to fail soon, one sentence each."""
    hosts = [seat.host for seat in seats]
    told = []
    if spanning := spanning_groups(hosts, tensor_parallel):
        rank, names = spanning[0]
        size = min(Counter(hosts).values())
        remedy = (
            "let ranks of one host follow each other (srun --distribution=block:block)"
            if size >= tensor_parallel
            else f"parallel.tensor_model_parallel_size of at most {size}, the ranks of a host, and pipeline stages "
            "(parallel.pipeline_model_parallel_size) across hosts"
        )
        told.append(
            f"{len(spanning)} of {len(hosts) // tensor_parallel} tensor-parallel groups span hosts, the one of rank "
            f"{rank} {_named(names)}: every layer waits for the network between them; {remedy}, unless NVLink joins "
            "these hosts"
        )
    gpus = [seat for seat in seats if seat.device is not None]
    locked = [seat.host for seat in gpus if seat.lockable is not None]
    if locked and len(set(hosts)) > 1:
        told.append(
            f"memory that may be locked is limited on {_named(locked)}, and InfiniBand needs it: memlock unlimited in "
            "the node's limits.conf (Slurm: and in slurmd's unit), docker run --ulimit memlock=-1"
        )
    if small := [seat.host for seat in gpus if seat.shared is not None and seat.shared < ENOUGH]:
        told.append(
            f"/dev/shm is smaller than 1 GiB on {_named(small)}, where NCCL and data workers pass data on: "
            "docker run --shm-size=8g or --ipc=host"
        )
    return told


def _named(hosts: Sequence[str]) -> str:
    different = list(dict.fromkeys(hosts))
    more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    return ", ".join(different[:SHOWN]) + more


def check_placement(groups: ParallelGroups) -> None:
    """Collective, before the first one on GPUs. Rank 0 says on stderr what is slow.

    Raises:
        ConfigError: on all ranks; two of them have one GPU, which NCCL cannot work with.
    """
    if groups.world_size == 1:
        return
    store: Any = dist.distributed_c10d._get_default_store()
    turn = f"sgt/placement/{store.add(f'sgt/placement/rank {groups.rank}', 1)}"  # a store may outlive its processes
    store.set(f"{turn}/{groups.rank}", json.dumps(asdict(own_seat(groups.device))))
    if groups.is_main:
        seats = [Seat(**json.loads(store.get(f"{turn}/{rank}"))) for rank in range(groups.world_size)]
        wrong = shared_device(seats)
        for sentence in [] if wrong else advice(seats, groups.tp_size):
            print(f"warning: {sentence}", file=sys.stderr, flush=True)
        store.set(f"{turn}/verdict", wrong or "")
    if wrong := store.get(f"{turn}/verdict").decode():
        raise ConfigError(wrong)
    if groups.device.index is not None:
        # Until its first collective torch takes the rank modulo the GPUs of a host for the index of the rank's GPU,
        # and DeepSpeed's own barriers name none.
        barrier(groups)
