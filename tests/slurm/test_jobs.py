"""Jobs of two nodes in a real Slurm, submitted as a user does: interrupted, started again, done, and the same run.

`main` is a partition whose jobs those of `urgent` preempt. What happens to a run happens at a step: the ranks are
stopped while Slurm makes up its mind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.jsonl import read_metrics
from megatron_sgt.metrics import METRICS_FILE
from tests.helpers.commands import ROOT
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import measured_steps, pretrain, reported, tiny_config, write_tiny_data
from tests.helpers.slurm import NODES, SlurmCluster, until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 100
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
PATIENCE = 240
"""Seconds that a start and some steps may take on a busy machine."""
SETTINGS: dict[str, dict[str, Any]] = {
    "train": {"train_iters": STEPS, "eval_interval": 0, "exit_before_job_end_minutes": 0},
    "data": {"num_workers": 1},  # processes that Slurm signals, too
    "checkpoint": {"save_interval": 30, "keep_last": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def expected(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every step of the uninterrupted run measures."""
    folder = tmp_path_factory.mktemp("expected")
    run_on_ranks(2, pretrain, tiny_config(folder, data, **SETTINGS))
    return measured_steps(folder)


@pytest.fixture
def expected_of_stages(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same with a pipeline stage on each node."""
    folder = tmp_path_factory.mktemp("stages")
    parallel = {"pipeline_model_parallel_size": 2}
    run_on_ranks(2, pretrain, tiny_config(folder, data, **SETTINGS, parallel=parallel), backend="gloo")
    return measured_steps(folder)


class Job:
    """A run submitted with tools/submit_slurm.py, on two nodes, one rank each."""

    def __init__(self, cluster: SlurmCluster, folder: Path, data: str, *arguments: str) -> None:
        self.cluster, self.run_dir = cluster, folder / "run"
        config = folder / "run.yaml"
        config.write_text(tiny_config(self.run_dir, data, **SETTINGS).to_yaml())
        tool = [sys.executable, str(ROOT / "tools/submit_slurm.py"), "--config", str(config), "--nodes", "2"]
        said = cluster.run(
            *tool,
            "--cpus-per-task",
            "1",
            "--retries",
            "1",
            *arguments,
            cwd=folder,
            PYTHONPATH=str(ROOT),
        )
        self.number = said.split()[1]

    def step(self) -> int:
        """The last step in the metrics."""
        file = self.run_dir / METRICS_FILE
        steps = [record["step"] for record in read_metrics(file) if record["kind"] == "train"] if file.exists() else []
        return steps[-1] if steps else 0

    def starts(self) -> list[int]:
        """The step that every start of the job went on from."""
        return [record["step"] for record in reported(self.run_dir, "resume")]

    def reach(self, step: int) -> None:
        """Wait until ``step`` is done."""
        until(lambda: self.step() >= step, f"step {step}", PATIENCE, self.describe)

    @contextlib.contextmanager
    def held_until(self, number: signal.Signals, seconds: float) -> Iterator[None]:
        """Let the ranks stand still until Slurm has sent them a signal (or has also let them continue)."""
        ranks = self.cluster.tasks(self.number)
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        until(lambda: all(is_waiting(pid, number) for pid in ranks) and len(ranks) == 2, "a standstill", 10)
        yield
        until(lambda: not any(is_waiting(pid, number) for pid in ranks), number.name, seconds, self.describe)
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def log(self) -> str:
        """What the job script and srun said."""
        return (self.run_dir / "slurm" / f"{self.number}.log").read_text()

    def describe(self) -> str:
        """All logs."""
        logs = sorted((self.run_dir / "slurm").rglob("*.log"))
        return "\n".join([*(f"== {log}\n{log.read_text()[-3000:]}" for log in logs), self.cluster.describe()])

    def finish(self, expected: list[dict[str, Any]]) -> None:
        """Wait until the job is done, and compare every step with that of the uninterrupted run."""
        until(
            lambda: self.state() in ENDED,
            "the end",
            PATIENCE,
            self.describe,
        )
        assert self.state() == "COMPLETED", self.describe()
        by_step = {record["step"]: record for record in expected}
        steps = measured_steps(self.run_dir)
        assert {record["step"] for record in steps} == set(by_step) and len(by_step) == STEPS
        assert [record for record in steps if record != by_step[record["step"]]] == []

    def minutes(self) -> int:
        """Whole minutes that this start has taken."""
        hours, minutes, _ = self.cluster.job(self.number)["RunTime"].split(":")
        return 60 * int(hours) + int(minutes)

    def limit(self, minutes: int) -> None:
        """Set the time limit."""
        self.cluster.run("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")

    def state(self) -> str:
        """Slurm's word for what the job is doing."""
        return self.cluster.job(self.number)["JobState"]


def is_waiting(pid: int, number: signal.Signals) -> bool:
    """Whether the process is stopped, and the signal has not been sent to it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    status = dict(line.split(":\t", 1) for line in lines)
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return status["State"].startswith("T") and not pending >> (number - 1) & 1


@pytest.fixture
def submit(cluster: SlurmCluster, data: str, tmp_path: Path) -> Callable[..., Job]:
    return lambda *arguments: Job(cluster, tmp_path, data, *arguments)


def test_preempted_and_bereft_of_a_node_it_is_the_same_run(
    cluster: SlurmCluster, submit: Callable[..., Job], expected: list[dict[str, Any]]
) -> None:
    strike_twice(cluster, submit(), expected)


@pytest.mark.exhaustive
def test_so_is_one_with_a_pipeline_stage_on_each_node(
    cluster: SlurmCluster, submit: Callable[..., Job], expected_of_stages: list[dict[str, Any]]
) -> None:
    strike_twice(cluster, submit("parallel.pipeline_model_parallel_size=2"), expected_of_stages)


def strike_twice(cluster: SlurmCluster, job: Job, expected: list[dict[str, Any]]) -> None:
    """Preempt the job, then take a node from it."""
    job.reach(5)
    urgent = ["sbatch", "--partition=urgent", "-N2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    with job.held_until(signal.SIGTERM, 20):
        cluster.run(*urgent)
    job.reach(35)
    cluster.kill_node(NODES[1])
    until(lambda: job.state() != "RUNNING", "requeue", 60, job.describe)
    cluster.start_node(NODES[1])
    job.finish(expected)
    first, preempted, crashed = job.starts()
    assert first == 0 < preempted < 30, "saved when Slurm asked for it"
    assert crashed in (30, 60, 90)
    assert cluster.job(job.number)["Restarts"] == "2"


@pytest.fixture(scope="module")
def paused(
    cluster: SlurmCluster, data: str, expected: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[Job]]:
    """A job that meets its time limit and goes on, while the tests below do something else: Slurm looks at time
    limits every 30 s."""

    def live() -> Job:
        job = Job(cluster, tmp_path_factory.mktemp("paused"), data, "--time", "60", "--warn", "1")
        job.reach(5)
        with job.held_until(signal.SIGUSR1, 120):
            job.limit(job.minutes() + 1)
        job.limit(60)
        job.finish(expected)
        return job

    with ThreadPoolExecutor(1) as beside:
        job = beside.submit(live)
        yield job
        job.result()


@pytest.mark.usefixtures("paused")
def test_a_cancelled_job_saves_and_stays_cancelled(cluster: SlurmCluster, submit: Callable[..., Job]) -> None:
    job = submit()
    job.reach(5)
    cluster.run("scancel", job.number)
    cluster.wait(job.number, "CANCELLED", 20)
    until(lambda: "COMPLETING" not in cluster.run("squeue", "-h", "-j", job.number, "-o", "%T"), "end", 20)
    time.sleep(6)  # as long as a requeued job waits
    assert cluster.job(job.number)["JobState"] == "CANCELLED"
    assert cluster.job(job.number)["Restarts"] == "0"
    assert (job.run_dir / "checkpoints/latest").exists(), job.describe()


@pytest.mark.usefixtures("paused")
def test_srun_alone_is_a_launcher(
    cluster: SlurmCluster, data: str, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", data, **SETTINGS)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    script = [sys.executable, str(ROOT / "pretrain_sgt.py"), "--config", "run.yaml", "train.exit_interval=5"]
    cluster.run("srun", "-K", "-N2", "-n2", *script, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert measured_steps(tmp_path / "run") == expected[:5]


@pytest.mark.usefixtures("paused")
def test_a_mistake_is_not_repeated(cluster: SlurmCluster, submit: Callable[..., Job]) -> None:
    job = submit("deepspeed.zero_optimization.bucket=7")
    ended = cluster.wait(job.number, "FAILED", PATIENCE)
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0")
    assert "exit code 2" in job.log()
    ranks = sorted((job.run_dir / "slurm" / job.number).glob("rank-*.log"))
    assert [log.name for log in ranks] == ["rank-0000.log", "rank-0001.log"]
    assert "bucket" in "".join(log.read_text() for log in ranks)


def test_the_time_limit_is_a_pause(cluster: SlurmCluster, paused: Future[Job]) -> None:
    job = paused.result()
    first, again = job.starts()
    assert first == 0 < again < 30
    assert cluster.job(job.number)["Restarts"] == "1"
