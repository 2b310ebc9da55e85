"""A log on a full disk ends no run, and is said. The printed result of a command is another matter."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.config import Config
from megatron_sgt.errors import of_full_disk
from megatron_sgt.jsonl import read_metrics
from megatron_sgt.metrics import MetricsHub
from megatron_sgt.metrics.writers import TensorBoardWriter, _as_os_error
from tests.helpers.attempts import Attempt
from tests.helpers.commands import ROOT, Finished, run_process, run_script
from tests.helpers.edges import refused
from tests.helpers.runs import tiny_config, write_tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def config_of(folder: Path, data: str, **sections: dict[str, Any]) -> Config:
    train = {"train_iters": 3, "eval_interval": 0, **sections.pop("train", {})}
    config = tiny_config(folder / "run", data, train=train, **sections)
    (folder / "run.yaml").write_text(config.to_yaml())
    return config


def full_stdout() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def full_streams() -> None:
    full_stdout()
    os.dup2(1, 2)


def pretrain(folder: Path, before: Any = None, *more: str) -> Finished:
    return run_script("pretrain_sgt.py", ["--config", "run.yaml", *more], folder, before=before)


def test_a_run_outlives_its_console(data: str, tmp_path: Path) -> None:
    config_of(tmp_path, data)
    done = pretrain(tmp_path, full_stdout)
    assert done.code == 0, done.err
    first, last = done.err.splitlines()
    assert first == "warning: stdout cannot be written (No space left on device); the run goes on and tries again"
    assert last.startswith("warning: stdout has lost ")
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["kind"] == "summary"
    assert (tmp_path / "run/checkpoints/latest").exists()


def test_both_streams_on_the_full_disk(data: str, tmp_path: Path) -> None:
    """``> log 2>&1``, and a file of metrics on the same disk: the checkpoint is there, and the exit code."""
    config_of(tmp_path, data)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to("/dev/full")
    assert pretrain(tmp_path, full_streams).code == 0
    assert (tmp_path / "run/checkpoints/latest").exists()


def test_metrics_that_cannot_be_written_are_counted(data: str, tmp_path: Path) -> None:
    config_of(tmp_path, data, logging={"tensorboard": True})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to("/dev/full")
    done = pretrain(tmp_path)
    assert done.code == 0 and "DONE" in done.out
    first, last = done.err.splitlines()
    assert "JsonlWriter cannot write ([Errno 28] No space left on device" in first
    assert re.match(r"warning: JsonlWriter lost \d reports \(\[Errno 28\] No space left on device", last)


@pytest.mark.parametrize("error", [errno.EDQUOT, errno.ENOSPC, errno.EROFS])
def test_a_start_is_refused_on_all_ranks(error: int, data: str, tmp_path: Path) -> None:
    """Before the first step nothing is lost, and a run that cannot write its configuration will not save either."""
    if error != errno.EDQUOT:  # two ranks once; what is refused is the same
        config_of(tmp_path, data)
        done = pretrain(tmp_path, {errno.ENOSPC: no_space, errno.EROFS: read_only}[error])
        refused(done, 2, "logging.run_dir: cannot write to .*run: ", "make room, or choose another folder")
        return
    config_of(tmp_path, data, parallel={"tensor_model_parallel_size": 2})
    attempt = Attempt(tmp_path / "out", ["--config", str(tmp_path / "run.yaml")], 2, no_quota)
    try:
        assert attempt.wait([0, 1], 60) == [2, 2]
        told = [line for finished in attempt.finished() for line in finished.err.splitlines() if "error: " in line]
    finally:
        attempt.end()
    assert len(told) == 1 and "Disk quota exceeded; make room, or choose another folder" in told[0]


def fail_to_write(number: int) -> None:
    """Let the run's own configuration meet an error of the file system."""
    from megatron_sgt.engine import run_folders

    def broken(path: Path, text: str) -> None:
        raise OSError(number, os.strerror(number), str(path))

    run_folders.replace_text = broken  # type: ignore[assignment]


def no_quota(rank: int) -> None:
    fail_to_write(errno.EDQUOT)


def no_space() -> None:
    fail_to_write(errno.ENOSPC)


def read_only() -> None:
    fail_to_write(errno.EROFS)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("pretrain_sgt.py", ["--config", "run.yaml", "--print-config"]),
        ("pretrain_sgt.py", ["--config", "run.yaml", "--dry-run"]),
        ("tools/plan.py", ["--config", "run.yaml", "--gpus-per-node", "1"]),
    ],
)
def test_a_result_that_cannot_be_printed(script: str, arguments: list[str], data: str, tmp_path: Path) -> None:
    config_of(tmp_path, data)
    done = run_script(script, arguments, tmp_path, before=full_stdout)
    refused(done, 1, "cannot write the output: No space left on device; make room and start again")


@pytest.mark.parametrize("script", ["pretrain_sgt.py --print-config", "tools/plan.py --gpus-per-node 1"])
def test_a_reader_that_went_away(script: str, data: str, tmp_path: Path) -> None:
    config_of(tmp_path, data)
    command = f"{sys.executable} {ROOT}/{script} --config run.yaml | true; exit ${{PIPESTATUS[0]}}"
    assert run_process(["bash", "-c", command], tmp_path) == Finished(141, "", "")


class Failing:
    """A destination that is out of order for a while."""

    broken = True

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        if self.broken:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    def advance(self, step: int) -> None: ...

    def close(self) -> None: ...


def test_a_writer_is_told_once_tried_again_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    writer = Failing()
    hub = MetricsHub([writer])
    for step in (1, 2, 3, 4):
        writer.broken = step < 4
        hub.log("train", {"step": step})
    hub.close()
    hub.close()
    assert capsys.readouterr().err.splitlines() == [
        "warning: Failing cannot write ([Errno 122] Disk quota exceeded); training goes on",
        "warning: Failing lost 3 reports ([Errno 122] Disk quota exceeded)",
    ]


def test_tensorboard_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    """Its file is whole: TensorBoard reads nothing behind half a record."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoardWriter(tmp_path)
    writer.write("train", {"step": 1, "loss": 1.0})
    real = writer._file._file

    class Full:
        def write(self, data: bytes) -> int:
            return real.write(data[: len(data) // 2])

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    writer._file._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        writer.write("train", {"step": 2, "loss": 2.0})
    writer._file._file = real
    writer.write("train", {"step": 3, "loss": 3.0})
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 3]


def test_errors_of_a_client_are_like_those_of_a_disk() -> None:
    with pytest.raises(OSError, match="ValueError: the service is gone"), _as_os_error():
        raise ValueError("the service is gone\nmore")


def test_the_error_of_a_full_disk() -> None:
    told = of_full_disk(OSError(errno.EDQUOT, "Disk quota exceeded", "a/b"))
    assert str(told) == "cannot write a/b: Disk quota exceeded; make room and start again"
    assert of_full_disk(OSError(errno.EACCES, "Permission denied")) is None


def test_the_device_is_what_the_tests_take_it_for() -> None:
    assert subprocess.run(["bash", "-c", "echo x > /dev/full"], stderr=subprocess.DEVNULL, check=False).returncode == 1
