"""One script under every launcher: the same run, the cause of a failure told once, the documented exit code."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from megatron_sgt.launch.rank_info import free_port
from megatron_sgt.launch.slurm import step_port
from tests.helpers.attempts import Attempt
from tests.helpers.commands import (
    LAUNCHER_VARIABLES,
    MPI_ENVIRONMENT,
    ROOT,
    Finished,
    no_mpi,
    without_launcher,
)
from tests.helpers.exhaustive import exhaustive
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import measured_steps, pretrain, reported, tiny_config, write_tiny_data

SCRIPT = str(ROOT / "pretrain_sgt.py")
ENVIRONMENT = {
    **without_launcher(),
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    "OMP_NUM_THREADS": "1",
    **MPI_ENVIRONMENT,
}
STEPS = 3
TIMEOUT = 240


def run(command: Sequence[str], cwd: Path) -> Finished:
    """Run a launcher, or the script alone, and wait for its end."""
    done = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def alone(arguments: list[str], cwd: Path) -> Finished:
    return run([sys.executable, SCRIPT, *arguments], cwd)


def torchrun(arguments: list[str], cwd: Path) -> Finished:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return run([sys.executable, *launcher, SCRIPT, *arguments], cwd)


def deepspeed(arguments: list[str], cwd: Path) -> Finished:
    """As `deepspeed --num_gpus 2 pretrain_sgt.py ...`, which starts two processes on a machine without GPUs too."""
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    return run([sys.executable, *launcher, SCRIPT, *arguments], cwd)


def srun(arguments: list[str], cwd: Path) -> Finished:
    """What `srun -K -n 2 python pretrain_sgt.py ...` leaves in the environments of its tasks, here two forks.

    tests/slurm has a real one.
    """
    job = next(str(n) for n in range(os.getpid(), 10**9) if port_is_free(str(n)))
    step = {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": socket.gethostname(),
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
    }
    tasks = Attempt(cwd, arguments, 2, partial(become_a_task, step))
    try:
        code = tasks.first_failure(TIMEOUT)
    finally:
        tasks.end()
    ranks = tasks.finished()
    return Finished(code, "".join(rank.out for rank in ranks), "".join(rank.err for rank in ranks))


def become_a_task(step: dict[str, str], rank: int) -> None:
    for name in [name for name in os.environ if name.startswith(LAUNCHER_VARIABLES)]:
        del os.environ[name]
    os.environ.update({**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})


def port_is_free(job: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", step_port({"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0"})))
        except OSError:
            return False
    return True


def mpirun(arguments: list[str], cwd: Path) -> Finished:
    return run(["mpirun", "-n", "2", sys.executable, SCRIPT, *arguments], cwd)


NO_MPI = pytest.mark.skipif(no_mpi(), reason="needs mpirun (Debian: openmpi-bin) and mpi4py")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def expected(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, object]]]:
    """The steps of the run, by number of ranks."""
    steps = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp("expected")
        run_on_ranks(ranks, pretrain, tiny_config(folder, data, train={"exit_interval": STEPS}))
        steps[ranks] = measured_steps(folder)
    return steps


def write_config(folder: Path, data: str) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(tiny_config(folder / "run", data, train={"exit_interval": STEPS}).to_yaml())
    return ["--config", str(path)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "ranks"),
    # tests/integration/test_stop.py starts a whole run through deepspeed, too.
    [(alone, 1), (torchrun, 2), exhaustive((deepspeed, 2)), (srun, 2)],
)
def test_every_launcher_runs_the_same(
    launcher: object, ranks: int, data: str, expected: dict[int, list[dict[str, object]]], tmp_path: Path
) -> None:
    check_run(launcher, expected[ranks], expected[1], data, tmp_path)


@pytest.mark.slow
@pytest.mark.mpi
@NO_MPI
def test_mpirun_runs_the_same(data: str, expected: dict[int, list[dict[str, object]]], tmp_path: Path) -> None:
    check_run(mpirun, expected[2], expected[1], data, tmp_path)


def check_run(launcher: object, expected: list[dict], alone: list[dict], data: str, folder: Path) -> None:
    assert callable(launcher)
    done = launcher(write_config(folder, data), folder)
    assert done.code == 0, done.err
    steps = measured_steps(folder / "run")
    assert steps == expected
    assert [s["loss"] for s in steps] == pytest.approx([s["loss"] for s in alone], abs=2e-6)
    assert done.out.count("DONE") == 1 and done.out.count(f"step {STEPS}/") >= 1, "rank 0 alone reports"
    assert "Warning" not in done.err and "Traceback" not in done.err, done.err
    assert [record["step"] for record in reported(folder / "run", "summary")] == [STEPS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "mistake", "code", "told"),
    [
        (deepspeed, "model.num_layer=3", 2, "did you mean 'num_layers'?"),
        exhaustive((deepspeed, "data.data_path=[/nowhere/data]", 3, "/nowhere/data")),
        (srun, "data.data_path=[/nowhere/data]", 3, "/nowhere/data"),
        (srun, "checkpoint.load=/nowhere/there", 4, "no checkpoint at /nowhere/there"),
        (srun, "optim.lr=1e20", 1, "3 steps in a row"),
    ],
)
def test_two_ranks_tell_the_cause_once(
    launcher: object, mistake: str, code: int, told: str, data: str, tmp_path: Path
) -> None:
    assert callable(launcher)
    arguments = [*write_config(tmp_path, data), mistake, "train.exit_interval=null", "optim.min_lr=0"]
    done = launcher(arguments, tmp_path)
    assert done.code == code, done.err
    lines = [line for line in done.err.splitlines() if "error: " in line]
    assert len(lines) == 1 and told in lines[0], done.err
    assert SCRIPT not in done.err and "megatron_sgt/" not in done.err, "a user's mistake has no traceback"
