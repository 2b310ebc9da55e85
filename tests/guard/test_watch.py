"""A rank dies, stops or fails, and no launcher is there to end the others: the ranks themselves name it and leave."""

from __future__ import annotations

import json
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.attempts import attempt
from tests.helpers.exhaustive import share_of
from tests.helpers.runs import tiny_config, write_tiny_data

HANG_SECONDS = 3.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def endless(tmp_path: Path, data: str, **parallel: Any) -> tuple[Path, Path]:
    """(configuration file, run folder) of a run that does not end by itself."""
    run_dir = tmp_path / "run"
    train = {
        "train_iters": 10**6,
        "eval_interval": 0,
        "hang_timeout_seconds": HANG_SECONDS,
        "slow_phase_timeout_seconds": 60.0,
    }
    path = tmp_path / "run.yaml"
    path.write_text(tiny_config(run_dir, data, train=train, parallel=parallel).to_yaml())
    return path, run_dir


def reports(errors: list[str]) -> list[str]:
    """The first lines of the reports, over all ranks."""
    words = ("LOST  ", "HANG  ", "FAILED  ", "error: ")
    return [line for text in errors for line in text.splitlines() if line.startswith(words)]


@pytest.mark.parametrize("victim", [0, 1], ids=["the store's host", "another rank"])
def test_a_killed_rank_is_named_within_seconds(victim: int, data: str, tmp_path: Path) -> None:
    config, run_dir = endless(tmp_path, data, tensor_model_parallel_size=1 + victim)
    with attempt(tmp_path / "ranks", config, 2) as run:
        run.wait_for_step(run_dir, 3)
        start = run.signal(victim, signal.SIGKILL)
        (code,) = run.wait([1 - victim], timeout=30)
        seconds = time.monotonic() - start
        done = run.finished()
    assert code == 1 and seconds < 10, (code, seconds, done)
    survivor = done[1 - victim].err
    (head,) = reports([survivor])
    assert head.startswith(f"LOST  rank {victim} of 2 on {socket.gethostname()}, in step "), head
    assert "SIGKILL" in survivor and "Traceback" not in survivor and "gloo" not in survivor, survivor
    (report,) = (run_dir / "failures").glob("*/report.txt")
    assert report.read_text() in survivor


@pytest.mark.parametrize("victim", [0, 1], ids=["the store's host", "another rank"])
def test_a_stopped_rank_is_named_after_the_timeout(victim: int, data: str, tmp_path: Path) -> None:
    config, run_dir = endless(tmp_path, data)
    others = [rank for rank in range(3) if rank != victim]
    config.write_text(config.read_text().replace("global_batch_size: 8", "global_batch_size: 12"))
    with attempt(tmp_path / "ranks", config, 3) as run:
        run.wait_for_step(run_dir, 3)
        start = run.signal(victim, signal.SIGSTOP)
        codes = run.wait(others, timeout=60)
        seconds = time.monotonic() - start
        done = run.finished()
    assert codes == [1, 1], (seconds, done)
    assert HANG_SECONDS < seconds < HANG_SECONDS + 10
    (head,) = reports([done[rank].err for rank in others])
    assert head.startswith(f"HANG  rank {victim} of 3 on {socket.gethostname()}, in step "), head
    text = "".join(done[rank].err for rank in others)
    assert f"behind: rank {victim}\n" in text and "stopped by a signal" in text
    (folder,) = (run_dir / "failures").glob("*-*")
    for rank in others:
        stacks = (folder / f"rank_{rank:05d}.stacks.txt").read_text()
        assert "_train_to" in stacks and "_watch_progress" in stacks, "all threads of the rank"
        assert "in step " in stacks.splitlines()[0] and "_train_to" in done[rank].err
        entries = json.loads((folder / f"rank_{rank:05d}.collectives.json").read_text())["entries"]
        assert any("all" in entry["profiling_name"] for entry in entries), "its last collectives"
        assert (folder / f"nccl_trace_rank_{rank}").stat().st_size > 0


def hang_in_attention(victim: int, step: int, rank: int) -> None:
    """Let ``victim`` never come out of an attention of ``step``."""
    from megatron_sgt.engine import step as step_module
    from megatron_sgt.model.core_attention import SGTCoreAttention

    attend, begin, steps = SGTCoreAttention.attend, step_module.begin_step, []

    def counted(model: Any) -> None:
        steps.append(1)
        begin(model)

    def stuck(self: Any, *arguments: Any, **options: Any) -> Any:
        if len(steps) == step:
            time.sleep(600)
        return attend(self, *arguments, **options)

    if rank == victim:
        step_module.begin_step = counted
        SGTCoreAttention.attend = stuck  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("stages", "ranks", "victim", "how"),
    share_of(
        [
            (2, 4, 2, "killed"),
            (3, 3, 1, "stopped"),
            (3, 3, 1, "stuck"),
            (2, 4, 0, "stuck"),
            (2, 4, 3, "stuck"),
            (2, 4, 2, "stopped"),
            (3, 3, 1, "killed"),
        ],
        [(2, 4, 2, "killed"), (3, 3, 1, "stuck")],
    ),
)
def test_a_rank_of_a_pipeline_is_named_and_not_the_neighbours_that_wait_for_it(
    stages: int, ranks: int, victim: int, how: str, data: str, tmp_path: Path
) -> None:
    config, run_dir = endless(tmp_path, data, pipeline_model_parallel_size=stages)
    inject = partial(hang_in_attention, victim, 4) if how == "stuck" else None
    others = [rank for rank in range(ranks) if rank != victim]
    with attempt(tmp_path / "ranks", config, ranks, inject) as run:
        run.wait_for_step(run_dir, 3)
        if how != "stuck":
            run.signal(victim, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        codes = run.wait(others, timeout=90)
        done = run.finished()
    assert codes == [1] * len(others), done
    (head,) = reports([one.err for one in done])
    word = "LOST" if how == "killed" else "HANG"
    assert head.startswith(f"{word}  rank {victim} of {ranks} on {socket.gethostname()}, in step "), done
    if how != "killed":
        assert f"behind: rank {victim}\n" in "".join(one.err for one in done)


def work_alone(flag: Path, rank: int) -> None:
    """Let rank 0 build its indices for a minute."""
    from megatron_sgt.data import gpt_dataset

    def slowly(*arguments: Any) -> None:
        flag.touch()
        time.sleep(60)

    if rank == 0:
        gpt_dataset._prepare = slowly


def test_rank_zero_dies_while_the_others_wait_at_the_store(data: str, tmp_path: Path) -> None:
    config, _ = endless(tmp_path, data)
    flag = tmp_path / "at work"
    with attempt(tmp_path / "ranks", config, 2, partial(work_alone, flag)) as run:
        deadline = time.monotonic() + 60
        while not flag.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        start = run.signal(0, signal.SIGKILL)
        (code,) = run.wait([1], timeout=30)
        seconds = time.monotonic() - start
        done = run.finished()
    assert code == 1 and seconds < 10, (code, seconds, done)
    (head,) = reports([done[1].err])
    assert head.startswith("LOST  rank 0 of 2 on ") and head.endswith(", in opening the data"), head


def close_slowly(rank: int) -> None:
    """Let rank 0 take its time to send what it has reported."""
    from megatron_sgt.metrics import MetricsHub

    close = MetricsHub.close

    def slowly(self: MetricsHub) -> None:
        time.sleep(4)
        close(self)

    if rank == 0:
        MetricsHub.close = slowly  # type: ignore[method-assign]


def test_nobody_leaves_while_rank_zero_closes_its_reports(data: str, tmp_path: Path) -> None:
    config, run_dir = endless(tmp_path, data)
    config.write_text(config.read_text().replace("train_iters: 1000000", "train_iters: 4"))
    with attempt(tmp_path / "ranks", config, 2, close_slowly) as run:
        codes = run.wait([0, 1], timeout=60)
        done = run.finished()
    assert codes == [0, 0] and reports([one.err for one in done]) == [], done
    assert not (run_dir / "failures").exists(), "nothing is left of a run that ended well"


def fail_in_step(step: int, error: Exception, rank: int) -> None:
    """Let rank 1 fail with ``error`` when it fetches the data of ``step``."""
    from megatron_sgt.data.loader import TrainLoader

    fetch = TrainLoader.__next__

    def failing(self: TrainLoader) -> Any:
        if rank == 1 and self.consumed_samples >= (step - 1) * self.global_batch_size:
            raise error
        return fetch(self)

    TrainLoader.__next__ = failing  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["bug", "mistake"])
def test_a_failing_rank_is_named_and_its_exit_code_is_all_ranks(kind: str, data: str, tmp_path: Path) -> None:
    from megatron_sgt.errors import DataError

    error = ZeroDivisionError("seven by none") if kind == "bug" else DataError("a file is gone; copy it")
    config, _ = endless(tmp_path, data)
    with attempt(tmp_path / "ranks", config, 2, partial(fail_in_step, 4, error)) as run:
        codes = run.wait([0, 1], timeout=60)
        done = run.finished()
    assert codes == ([1, 1] if kind == "bug" else [3, 3]), done
    (line,) = reports([one.err for one in done])
    if kind == "bug":
        assert line == f"FAILED  rank 1 of 2 on {socket.gethostname()}, in step 4 (data)"
        assert "cause  ZeroDivisionError: seven by none" in done[1].err
        assert "[rank 1] Traceback" in done[1].err
    else:
        assert line.startswith("error: a file is gone; copy it (rank 1 on ")
    assert "Traceback" not in done[0].err, done[0].err
