"""One writer per folder: a second start of any kind is refused, a stopped run ends when it goes on, nothing is damaged.

One run is started, and everything else happens to it while it trains.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.jsonl import read_metrics
from megatron_sgt.lease import inside
from tests.helpers.attempts import Attempt
from tests.helpers.commands import Finished, run_script, snapshot
from tests.helpers.edges import refused
from tests.helpers.runs import tiny_config, write_tiny_data

TIMEOUT = 2.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(params=[(False, TIMEOUT, 1), (True, TIMEOUT, 2)], ids=["sync", "async, two ranks"])
def run(request: pytest.FixtureRequest, data: str, tmp_path: Path) -> Iterator[tuple[Attempt, Path]]:
    """A run that trains until it is asked to stop, and its configuration file."""
    asynchronous, timeout, ranks = request.param
    config = tiny_config(
        tmp_path / "run",
        data,
        train={"train_iters": 100_000, "eval_interval": 0, "threads_per_rank": 1},
        checkpoint={"save_interval": 5, "async_save": asynchronous, "writer_timeout_seconds": timeout},
    )
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml())
    attempt = Attempt(tmp_path / "first", ["--config", str(file)], ranks)
    try:
        attempt.wait_for_step(tmp_path / "run", 12)
        yield attempt, file
    finally:
        attempt.end()


def assert_whole(root: Path) -> None:
    tags = layout.finished_tags(root)
    assert tags
    for tag in tags:
        assert manifest.checksum_problems(root / tag) == [], tag


def test_second_starts_are_refused_and_a_stopped_run_ends(run: tuple[Attempt, Path], tmp_path: Path) -> None:
    first, file = run
    root, pid = tmp_path / "run/checkpoints", first.processes[0].pid
    elsewhere = tmp_path / "other"
    for script, arguments in (
        ("pretrain_sgt.py", ["--config", str(file)]),
        ("pretrain_sgt.py", ["--config", str(file), f"logging.run_dir={elsewhere}", f"checkpoint.save={root}"]),
        ("tools/reshard_checkpoint.py", ["--load", str(root), "--output", str(root.parent)]),
    ):
        line = refused(run_script(script, arguments, tmp_path), 4, rf"pid {pid}\b", "last sign of life")
        assert str(root.parent) in line and not elsewhere.exists()
    dry = run_script("pretrain_sgt.py", ["--config", str(file), "--dry-run"], tmp_path)
    assert dry.code == 0 and f"pid {pid}" in dry.out
    assert first.processes[0].is_alive()

    ranks = list(range(len(first.processes)))
    for rank in ranks:
        first.signal(rank, signal.SIGSTOP)
    time.sleep(TIMEOUT)
    second = run_script("pretrain_sgt.py", ["--config", str(file), "train.exit_duration_minutes=0.02"], tmp_path)
    assert second.code == 75 and f"pid {pid}" in second.err and "RESUME" in second.out, second.err
    written = snapshot(tmp_path / "run")
    for rank in ranks:
        first.signal(rank, signal.SIGCONT)
    assert first.wait(ranks, 30) == [4] * len(ranks)
    assert snapshot(tmp_path / "run") == written, "it has written after it had lost the folder"
    said = "".join(one.err for one in first.finished())
    refused(Finished(4, "", said), 4, "taken for dead")  # by one rank, whichever was first
    assert_whole(root)
    resumes = [record for record in read_metrics(tmp_path / "run/metrics.jsonl") if record["kind"] == "resume"]
    assert len(resumes) == 2


@pytest.mark.parametrize("run", [(True, 120.0, 1)], ids=["async"], indirect=True)
def test_a_folder_that_is_deleted_under_a_run_is_made_again(run: tuple[Attempt, Path], tmp_path: Path) -> None:
    first, _ = run
    run_dir = tmp_path / "run"
    run_dir.rename(tmp_path / "moved")
    first.wait_for_step(run_dir, 0)
    first.signal(0, signal.SIGTERM)
    assert first.wait([0], 60) == [75]
    said = first.finished()[0].err
    assert "deleted or moved away" in said and "warning" in said and "Traceback" not in said
    assert (run_dir / "config.yaml").read_text() == (tmp_path / "moved/config.yaml").read_text()
    assert_whole(run_dir / "checkpoints")
    records = read_metrics(run_dir / "metrics.jsonl")
    assert records[-1]["kind"] == "summary" and records[-1]["exit_code"] == 75
    assert not inside(run_dir).exists()
