"""What a process must know about its run before it can communicate with the others."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_sgt.errors import ConfigError

Launcher = Literal["single", "torchrun", "deepspeed", "slurm", "mpi"]
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class RankInfo:
    """One process's rank, and where rank 0 listens.

    Raises:
        ConfigError: the numbers are inconsistent.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: Launcher

    def __post_init__(self) -> None:
        ranks_fit = 0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size
        if not ranks_fit or self.local_world_size > self.world_size:
            raise ConfigError(
                f"{self.launcher}: rank {self.rank} of {self.world_size} processes, local rank "
                f"{self.local_rank} of {self.local_world_size} here: ranks count from 0, and a node "
                "holds no more than all processes"
            )
        if not 0 < self.master_port < 65536:
            raise ConfigError(f"{self.launcher}: MASTER_PORT must be a port from 1 to 65535, got {self.master_port}")


def to_environ(info: RankInfo) -> dict[str, str]:
    """Return the variables that torch.distributed and DeepSpeed read."""
    return {
        "MASTER_ADDR": info.master_addr,
        "MASTER_PORT": str(info.master_port),
        "RANK": str(info.rank),
        "WORLD_SIZE": str(info.world_size),
        "LOCAL_RANK": str(info.local_rank),
        "LOCAL_WORLD_SIZE": str(info.local_world_size),
    }


def read_int(environ: Mapping[str, str], *names: str) -> int | None:
    """Return the first of these variables that is set, or None.

    Raises:
        ConfigError: its value is no integer.
    """
    for name in names:
        text = environ.get(name, "")
        if not text:
            continue
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"environment variable {name} must be an integer, got '{text}'") from None
    return None


def require_int(environ: Mapping[str, str], *names: str) -> int:
    """Return the first of these variables that is set.

    Raises:
        ConfigError: none is set.
    """
    value = read_int(environ, *names)
    if value is None:
        raise ConfigError(f"environment variable {' or '.join(names)} is not set, but this process is one of several")
    return value


def free_port() -> int:
    """Return a TCP port that is free on this machine at the moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
