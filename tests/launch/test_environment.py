"""Discovery of ranks from the environment that each launcher leaves."""

from typing import Any

import pytest

from megatron_sgt.errors import ConfigError
from megatron_sgt.launch.environment import RankInfo, discover, to_environ

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "812345",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
SBATCH_SHELL = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN, RankInfo(5, 8, 1, 4, "node1", 29500, "torchrun")),
        (DEEPSPEED, RankInfo(5, 8, 1, 4, "node1", 29500, "deepspeed")),
        ({**SRUN, **TORCHRUN}, RankInfo(5, 8, 1, 4, "node1", 29500, "torchrun")),
        ({**TORCHRUN, "OMPI_COMM_WORLD_SIZE": "2"}, RankInfo(5, 8, 1, 4, "node1", 29500, "torchrun")),
        (SRUN, RankInfo(5, 8, 1, 4, "gpu07", 20000 + (37 * 812345) % 12000, "slurm")),
        (
            # srun that speaks PMI to its tasks: no MPI program, so no mpi4py needed.
            {**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8"},
            RankInfo(5, 8, 1, 4, "gpu07", 20000 + (37 * 812345) % 12000, "slurm"),
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "7"},
            RankInfo(0, 1, 0, 1, "x", 7, "torchrun"),
        ),
    ],
)
def test_discover(environ: dict[str, str], expected: RankInfo) -> None:
    assert discover(environ) == expected


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"RANK": "", "WORLD_SIZE": ""},
        {"LOCAL_RANK": "3", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"},
        SBATCH_SHELL,
        {**SRUN, "SLURM_STEP_ID": "4294967290"},  # the interactive shell of salloc
        {**SRUN, "SLURM_STEP_ID": "4294967291"},  # the batch script
    ],
)
def test_single_process(environ: dict[str, str]) -> None:
    info = discover(environ)
    assert (info.rank, info.world_size, info.local_rank, info.local_world_size) == (0, 1, 0, 1)
    assert (info.master_addr, info.launcher) == ("127.0.0.1", "single")
    assert 0 < info.master_port < 65536


def test_one_exported_process_needs_no_meeting_point() -> None:
    info = discover({"RANK": "0", "WORLD_SIZE": "1"})
    assert info.master_addr == "127.0.0.1"
    assert 0 < info.master_port < 65536


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (without(TORCHRUN, "WORLD_SIZE"), r"RANK is set \(5\) but WORLD_SIZE is not"),
        (without(TORCHRUN, "RANK"), r"WORLD_SIZE is set \(8\) but RANK is not"),
        (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK is not set"),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), "LOCAL_WORLD_SIZE or LOCAL_SIZE is not set"),
        (without(TORCHRUN, "MASTER_ADDR"), "WORLD_SIZE is 8 but MASTER_ADDR is not set"),
        (without(TORCHRUN, "MASTER_ADDR", "MASTER_PORT"), "MASTER_ADDR and MASTER_PORT is not set"),
        ({**TORCHRUN, "RANK": "8"}, "torchrun: rank 8 of 8 processes"),
        ({**TORCHRUN, "RANK": "-1"}, "torchrun: rank -1 of 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "local rank 1 of 9"),
        ({**TORCHRUN, "RANK": "five"}, "RANK must be an integer, got 'five'"),
        ({**TORCHRUN, "WORLD_SIZE": "8.0"}, "WORLD_SIZE must be an integer, got '8.0'"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT must be an integer, got 'http'"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT must be a port from 1 to 65535, got 70000"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE is 1, but 8 processes were started"),
        ({**TORCHRUN, "OMPI_COMM_WORLD_SIZE": "9"}, "WORLD_SIZE is 8, but 9 processes were started"),
        ({**SRUN, "SLURM_STEP_ID": "x"}, "SLURM_STEP_ID must be an integer, got 'x'"),
    ],
)
def test_half_set_or_impossible(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        discover(environ)


def test_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert discover() == discover(TORCHRUN)


@pytest.mark.parametrize("environ", [TORCHRUN, SRUN])
def test_export_is_what_torchrun_would_have_set(environ: dict[str, str]) -> None:
    info = discover(environ)
    exported = to_environ(info)
    assert set(exported) == set(TORCHRUN) - {"TORCHELASTIC_RUN_ID"}
    again: dict[str, Any] = {**vars(discover(exported)), "launcher": info.launcher}
    assert again == vars(info)
