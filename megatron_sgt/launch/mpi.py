"""Ranks under mpirun or mpiexec, from MPI itself: its launchers do not share environment variables."""

import importlib
import socket
from collections.abc import Mapping

from megatron_sgt.errors import ConfigError
from megatron_sgt.launch.rank_info import LOOPBACK, RankInfo, free_port, read_int

MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALRANKID")
"""Set by the launchers alone: Open MPI's mpirun; the Hydra mpiexec of MPICH, MVAPICH and Intel MPI."""


def started_by_mpi(environ: Mapping[str, str]) -> bool:
    """Say whether mpirun started this process.

    PMI_SIZE counts too, except where it only repeats the srun step of this task: srun offers PMI to all its tasks, MPI
    programs or not.
    """
    if any(name in environ for name in MPI_VARIABLES):
        return True
    if "PMI_SIZE" not in environ:
        return False
    step = (environ.get("SLURM_PROCID"), environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS")))
    return "SLURM_STEP_ID" not in environ or step != (environ.get("PMI_RANK"), environ["PMI_SIZE"])


def discover_mpi(environ: Mapping[str, str]) -> RankInfo:
    """Return this process's place in MPI_COMM_WORLD. Collective: all ranks must call it.

    Rank 0 names the meeting point: MASTER_ADDR and MASTER_PORT of its environment if set, else its host name
    (the loopback when all ranks share one host) and a port that is free there.

    Raises:
        ConfigError: mpi4py is missing or finds no MPI library.
    """
    try:
        mpi = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"started by mpirun, but mpi4py cannot be loaded ({error}); pip install megatron-sgt[mpi], "
            "or start with torchrun or srun"
        ) from error
    world = mpi.COMM_WORLD
    rank, world_size = world.Get_rank(), world.Get_size()
    host = world.Split_type(mpi.COMM_TYPE_SHARED, key=rank)
    local_rank, local_world_size = host.Get_rank(), host.Get_size()
    host.Free()
    meeting_point = None
    if rank == 0:
        own_name = LOOPBACK if local_world_size == world_size else socket.gethostname()
        meeting_point = (
            environ.get("MASTER_ADDR") or own_name,
            read_int(environ, "MASTER_PORT") or free_port(),
        )
    address, port = world.bcast(meeting_point, root=0)
    return RankInfo(rank, world_size, local_rank, local_world_size, address, port, "mpi")
