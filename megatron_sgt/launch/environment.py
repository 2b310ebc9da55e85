"""This process's rank and the meeting point of the run, read from the launcher's environment variables."""

import os
from collections.abc import Mapping

from megatron_sgt.errors import ConfigError
from megatron_sgt.launch.mpi import discover_mpi, started_by_mpi
from megatron_sgt.launch.rank_info import LOOPBACK, RankInfo, free_port, read_int, require_int, to_environ
from megatron_sgt.launch.slurm import discover_slurm, inside_srun_step

__all__ = ["RankInfo", "discover", "to_environ"]


def discover(environ: Mapping[str, str] | None = None) -> RankInfo:
    """Return the place of this process, from ``environ`` (default: os.environ).

    The first that applies: RANK and WORLD_SIZE (torchrun, the deepspeed launcher); mpirun, through mpi4py; a step of
    srun; else a single process. Explicit settings come before inherited ones: torchrun and mpirun may be started inside
    a Slurm job, whose variables their processes inherit.

    Raises:
        ConfigError: variables half set, not integers, out of range, or of fewer processes than srun or mpirun has
            started; mpirun without mpi4py.
    """
    environ = os.environ if environ is None else environ
    given = [name for name in ("RANK", "WORLD_SIZE") if environ.get(name)]
    if len(given) == 2:
        return _discover_exported(environ)
    if given:
        other = "WORLD_SIZE" if given == ["RANK"] else "RANK"
        raise ConfigError(
            f"environment variable {given[0]} is set ({environ[given[0]]}) but {other} is not; set both, "
            f"or unset {given[0]} and start with torchrun, deepspeed, srun or mpirun"
        )
    if started_by_mpi(environ):
        return discover_mpi(environ)
    if inside_srun_step(environ):
        return discover_slurm(environ)
    return RankInfo(0, 1, 0, 1, LOOPBACK, free_port(), "single")


def _discover_exported(environ: Mapping[str, str]) -> RankInfo:
    world_size = require_int(environ, "WORLD_SIZE")
    _refuse_leftovers(world_size, environ)
    address, port = environ.get("MASTER_ADDR"), read_int(environ, "MASTER_PORT")
    if world_size == 1:
        local_rank = read_int(environ, "LOCAL_RANK") or 0
        local_world_size = 1
        address, port = address or LOOPBACK, port or free_port()
    else:
        # Assuming a default here would put all ranks of a node on its first GPU.
        local_rank = require_int(environ, "LOCAL_RANK")
        local_world_size = require_int(environ, "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    if not address or port is None:
        missing = " and ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name))
        raise ConfigError(f"WORLD_SIZE is {world_size} but {missing} is not set: where is rank 0 to be met?")
    # The deepspeed launcher alone writes Horovod's names for the layout of the nodes.
    is_deepspeed = "CROSS_SIZE" in environ and "TORCHELASTIC_RUN_ID" not in environ
    return RankInfo(
        rank=require_int(environ, "RANK"),
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=address,
        master_port=port,
        launcher="deepspeed" if is_deepspeed else "torchrun",
    )


def _refuse_leftovers(world_size: int, environ: Mapping[str, str]) -> None:
    """Refuse a WORLD_SIZE inherited from the shell: each task would start a run of its own in the same folder."""
    step = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if inside_srun_step(environ) else ()
    tasks = read_int(environ, *step, "OMPI_COMM_WORLD_SIZE") or 1
    if tasks > world_size:
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but {tasks} processes were started: the variables of an earlier launch? "
            "Unset RANK and WORLD_SIZE before srun, sbatch or mpirun"
        )
