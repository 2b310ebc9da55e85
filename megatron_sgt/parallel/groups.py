"""Process groups: started once, then passed around as one frozen object."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sgt.config.parallel import ParallelConfig
from megatron_sgt.errors import ConfigError, first_line
from megatron_sgt.launch.rank_info import LOOPBACK, RankInfo
from megatron_sgt.parallel.device import backend_for


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's place in the run. Sizes and ranks are counts; groups are torch process groups."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    pp_rank: int
    pp_size: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    mp_group: dist.ProcessGroup
    device: torch.device

    @property
    def mp_rank(self) -> int:
        """Rank in ``mp_group``, which shares one copy of the model: tensor-parallel ranks first, then stages."""
        return self.tp_rank + self.tp_size * self.pp_rank

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def rank_at(self, pp_rank: int, dp_rank: int, tp_rank: int) -> int:
        """The global rank at a place: Megatron-Core's order, tensor-parallel ranks next to each other, stages last."""
        return (pp_rank * self.dp_size + dp_rank) * self.tp_size + tp_rank

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes shared files."""
        return self.rank == 0


def initialize_groups(config: ParallelConfig, info: RankInfo, device: torch.device) -> ParallelGroups:
    """Start torch.distributed and Megatron-Core's groups.

    Both get the same timeout: Megatron-Core's groups default to 30 minutes, and the peers of a stopped rank would wait
    that long.

    Raises:
        ConfigError: the ranks cannot meet.
    """
    timeout = datetime.timedelta(minutes=config.distributed_timeout_minutes)
    if not dist.is_initialized():
        backend = backend_for(device)
        if info.world_size == 1:
            # An in-process store: a single process needs no port, so it cannot collide over one.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        elif info.master_addr == LOOPBACK and not dist.is_torchelastic_launched():  # torchrun has its own store
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
            with _meeting(info, timeout):
                store = loopback_store(info, timeout)
                dist.init_process_group(
                    backend, store=store, rank=info.rank, world_size=info.world_size, timeout=timeout
                )
        else:
            with _meeting(info, timeout):
                dist.init_process_group(
                    backend,
                    init_method=f"tcp://{info.master_addr}:{info.master_port}",
                    rank=info.rank,
                    world_size=info.world_size,
                    timeout=timeout,
                )
    virtual = config.virtual_pipeline_model_parallel_size
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            distributed_timeout_minutes=config.distributed_timeout_minutes,
            create_gloo_process_groups=False,
        )
    return current_groups(device)


def loopback_store(info: RankInfo, timeout: datetime.timedelta) -> dist.TCPStore:
    """The meeting point of the ranks of one machine: a port that only this machine can reach.

    torch's own store listens on every interface and answers anybody.
    """
    listening = None
    if info.rank == 0:
        with socket.socket() as door:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind((LOOPBACK, info.master_port))
            listening = door.detach()
    return dist.TCPStore(
        LOOPBACK,
        info.master_port,
        info.world_size,
        info.rank == 0,
        timeout,
        wait_for_workers=False,
        master_listen_fd=listening,
    )


@contextlib.contextmanager
def _meeting(info: RankInfo, timeout: datetime.timedelta) -> Iterator[None]:
    try:
        yield
    except (OSError, dist.DistNetworkError, dist.DistStoreError) as error:
        taken = getattr(error, "errno", None) == errno.EADDRINUSE or "EADDRINUSE" in str(error)
        if info.rank == 0 and taken:
            raise ConfigError(
                f"rank 0 cannot listen on port {info.master_port}: another program does; set MASTER_PORT to a free "
                "port, or leave it to the launcher"
            ) from error
        raise ConfigError(
            f"rank {info.rank} of {info.world_size} has not met the others at {info.master_addr}:{info.master_port} "
            f"within parallel.distributed_timeout_minutes {timeout.total_seconds() / 60:g} ({first_line(error)}); "
            f"check that all ranks were started, that {info.master_addr} is a name or address of rank 0's node that "
            "all nodes know, and that no firewall closes the port"
        ) from error


def current_groups(device: torch.device) -> ParallelGroups:
    """The groups that are already initialised."""
    return ParallelGroups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        mp_group=parallel_state.get_model_parallel_group(),
        device=device,
    )


def destroy_groups() -> None:
    """Destroy the groups (at the end of a run, or between layouts in one test process)."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
