"""One script under every launcher: the same run, the cause of a failure told once, the documented exit code."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_sgt.launch.rank_info import free_port
from megatron_sgt.launch.slurm import step_port
from tests.helpers.commands import MPI_ENVIRONMENT, ROOT, Finished, no_mpi, without_launcher
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


def run(commands: Sequence[Sequence[str]], cwd: Path, *tasks: dict[str, str]) -> Finished:
    """Run the commands side by side; when one fails, end the others, as `srun -K` does."""
    running = []
    for index, (command, task) in enumerate(zip(commands, tasks or ({},), strict=True)):
        with (cwd / f"out{index}").open("w") as out, (cwd / f"err{index}").open("w") as err:
            environment = {**ENVIRONMENT, **task}
            running.append(subprocess.Popen(command, cwd=cwd, env=environment, stdout=out, stderr=err))
    code, deadline = 0, time.monotonic() + TIMEOUT
    while any(process.poll() is None for process in running):
        code = code or next((process.returncode for process in running if process.returncode), 0)
        if code or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for process in running:
        process.kill()
        process.wait()
    code = code or max(process.returncode for process in running)
    texts = [
        "".join((cwd / f"{name}{n}").read_text() for n in range(len(running))) for name in ("out", "err")
    ]
    return Finished(code, *texts)


def alone(arguments: list[str], cwd: Path) -> Finished:
    return run([[sys.executable, SCRIPT, *arguments]], cwd)


def torchrun(arguments: list[str], cwd: Path) -> Finished:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return run([[sys.executable, *launcher, SCRIPT, *arguments]], cwd)


def deepspeed(arguments: list[str], cwd: Path) -> Finished:
    """As `deepspeed --num_gpus 2 pretrain_sgt.py ...`, which starts two processes on a machine without GPUs too."""
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    return run([[sys.executable, *launcher, SCRIPT, *arguments]], cwd)


def srun(arguments: list[str], cwd: Path) -> Finished:
    """What `srun -K -n 2 python pretrain_sgt.py ...` leaves in its tasks' environments."""
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
    tasks = [{**step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    return run([[sys.executable, SCRIPT, *arguments]] * 2, cwd, *tasks)


def port_is_free(job: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", step_port({"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0"})))
        except OSError:
            return False
    return True


def mpirun(arguments: list[str], cwd: Path) -> Finished:
    return run([["mpirun", "-n", "2", sys.executable, SCRIPT, *arguments]], cwd)


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
@pytest.mark.parametrize(("launcher", "ranks"), [(alone, 1), (torchrun, 2), (deepspeed, 2), (srun, 2)])
def test_every_launcher_runs_the_same(
    launcher: object, ranks: int, data: str, expected: dict[int, list[dict[str, object]]], tmp_path: Path
) -> None:
    check_run(launcher, expected[ranks], expected[1], data, tmp_path)


@pytest.mark.slow
@pytest.mark.mpi
@NO_MPI
def test_mpirun_runs_the_same(
    data: str, expected: dict[int, list[dict[str, object]]], tmp_path: Path
) -> None:
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
        (deepspeed, "data.data_path=[/nowhere/data]", 3, "/nowhere/data"),
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
