"""A run that is asked to stop, under every launcher: all ranks save after the same step, and the run that is
started again is the uninterrupted run, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.config import Config
from megatron_sgt.errors import ExitCode
from megatron_sgt.launch.rank_info import free_port
from megatron_sgt.metrics import METRICS_FILE
from tests.helpers.commands import ROOT
from tests.helpers.exhaustive import exhaustive
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import measured_steps, pretrain, reported, tiny_config, write_tiny_data
from tests.integration.test_launchers import ENVIRONMENT, SCRIPT

AFTER = 4
"""Steps of the resumed run."""
TIMEOUT = 120


@dataclass
class Job:
    """Processes that a launcher has started, the launcher first."""

    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def add(self, folder: Path, *command: str, **environ: str) -> None:
        log = (folder / f"log{len(self.processes)}").open("w")
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**ENVIRONMENT, **environ},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Whoever runs the tests in the background of a shell ignores SIGINT, and so would the launcher.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        self.processes.append(process)

    def end(self) -> list[int]:
        """The exit codes, or -9 of what had to be killed."""
        deadline = time.monotonic() + TIMEOUT
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return [process.returncode for process in self.processes]


def torchrun(folder: Path, arguments: list[str]) -> Job:
    job = Job()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    job.add(folder, *launcher, SCRIPT, *arguments)
    return job


def deepspeed(folder: Path, arguments: list[str]) -> Job:
    job = Job()
    launcher = ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port()))
    job.add(folder, *launcher, SCRIPT, *arguments)
    return job


def tasks(folder: Path, arguments: list[str]) -> Job:
    """Two processes side by side, as srun starts them."""
    job, port = Job(), str(free_port())
    for rank in "01":
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        job.add(folder, SCRIPT, *arguments, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **place)
    return job


def to_launcher(signum: int) -> Callable[[Job], None]:
    return lambda job: job.processes[0].send_signal(signum)


def to_everyone(signum: int) -> Callable[[Job], None]:
    """As the terminal does with Ctrl-C: the launcher, and all that it has started."""
    return lambda job: os.killpg(job.processes[0].pid, signum)


def to_the_last(signum: int) -> Callable[[Job], None]:
    return lambda job: job.processes[-1].send_signal(signum)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def endless(run_dir: Path, data: str, stop: int | None = None) -> Config:
    ours = {"num_workers": 1}
    return tiny_config(
        run_dir,
        data,
        train={"train_iters": 1_000_000, "eval_interval": 0, "exit_interval": stop},
        data=ours,  # workers: processes that a signal to all must not end
    )


def wait_for_step(run_dir: Path, job: Job, step: int = 5) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not (run_dir / METRICS_FILE).exists() or len(measured_steps(run_dir)) < step:
        assert job.processes[0].poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "ask", "reason", "codes"),
    [
        # torchrun's own exit code is 1 whatever its ranks end with; it passes SIGTERM on.
        (torchrun, to_launcher(signal.SIGTERM), "SIGTERM", [1]),
        exhaustive((deepspeed, to_everyone(signal.SIGINT), "SIGINT", [-signal.SIGINT])),
        (tasks, to_the_last(signal.SIGUSR1), "SIGUSR1", [ExitCode.SAVED, ExitCode.SAVED]),
    ],
)
def test_it_saves_and_goes_on_as_if_nothing_had_been(
    launch: Callable[[Path, list[str]], Job],
    ask: Callable[[Job], None],
    reason: str,
    codes: list[int],
    data: str,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(endless(run_dir, data).to_yaml())
    job = launch(tmp_path, ["--config", str(tmp_path / "run.yaml")])
    wait_for_step(run_dir, job)
    ask(job)
    ended = job.end()
    output = "".join(path.read_text() for path in sorted(tmp_path.glob("log*")))
    assert ended == codes, output
    wait_for_end(run_dir)
    [stop] = reported(run_dir, "stop")
    assert stop["reason"] == reason and f"STOP  step {stop['step']}  {reason}" in output
    root = run_dir / "checkpoints"
    tag = layout.latest_tag(root)
    assert tag == layout.tag_for(stop["step"])
    manifest.verify_sizes(root / tag)
    [summary] = reported(run_dir, "summary")
    assert (summary["exit_code"], summary["step"]) == (ExitCode.SAVED, stop["step"])
    last = stop["step"] + AFTER
    for folder in (run_dir, tmp_path / "whole"):
        run_on_ranks(2, pretrain, endless(folder, data, last))
    assert measured_steps(run_dir) == measured_steps(tmp_path / "whole")
    assert measured_steps(run_dir)[-1]["step"] == last


def wait_for_end(run_dir: Path) -> None:
    """A launcher may have left before its ranks."""
    deadline = time.monotonic() + TIMEOUT
    while not reported(run_dir, "summary"):
        assert time.monotonic() < deadline, "the ranks did not end"
        time.sleep(0.05)
