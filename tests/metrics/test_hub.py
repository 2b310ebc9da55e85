"""The hub feeds every writer, survives one that fails, and is built from the configuration."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.config.run import LoggingConfig
from megatron_sgt.jsonl import read_metrics
from megatron_sgt.metrics import METRICS_FILE, MetricsHub, build_hub


class Recorder:
    def __init__(self, broken: bool = False) -> None:
        self.broken = broken
        self.seen: list[Any] = []

    def _act(self, what: Any) -> None:
        if self.broken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.seen.append(what)

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        self._act((kind, dict(record)))

    def advance(self, step: int) -> None:
        self._act(step)

    def close(self) -> None:
        self._act("closed")


def test_every_writer_gets_the_same_stamped_record() -> None:
    first, second = Recorder(), Recorder()
    hub = MetricsHub([first, second])
    record = {"step": 1, "loss": 2.0}
    hub.log("train", record)
    hub.advance(2)
    hub.close()
    assert first.seen == second.seen
    (kind, seen), step, closed = first.seen
    assert (kind, step, closed) == ("train", 2, "closed")
    assert seen == {**record, "time": seen["time"]} and seen["time"] > 1.6e9
    assert record == {"step": 1, "loss": 2.0}


def test_a_failing_writer_is_told_once_and_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    broken, sound = Recorder(broken=True), Recorder()
    hub = MetricsHub([broken, sound])
    for step in (1, 2):
        hub.log("train", {"step": step})
    broken.broken = False
    hub.log("train", {"step": 3})
    hub.close()
    assert [entry[1]["step"] for entry in sound.seen[:-1]] == [1, 2, 3]
    assert broken.seen[0][1]["step"] == 3
    error = capsys.readouterr().err
    assert error.count("warning: Recorder cannot write") == 1
    assert "No space left" in error


def test_a_bug_in_a_writer_is_not_hidden() -> None:
    class Buggy(Recorder):
        def write(self, kind: str, record: Mapping[str, Any]) -> None:
            raise KeyError("loss")

    with pytest.raises(KeyError):
        MetricsHub([Buggy()]).log("train", {"step": 1})


def test_an_unknown_kind_is_refused_even_without_writers() -> None:
    with pytest.raises(ValueError, match="got 'trian'"):
        MetricsHub().log("trian", {"step": 1})
    MetricsHub().log("train", {"step": 1})


@pytest.mark.parametrize(
    ("record", "message"),
    [({"hook": "mine"}, "lacks values"), ({"hook": "mine", "values": {"a": object()}}, "'mine' is not JSON-able")],
)
def test_a_hook_s_record_is_refused_even_without_writers(record: dict[str, Any], message: str) -> None:
    """On every rank alike: an error on rank 0 alone would leave the others waiting."""
    with pytest.raises(ValueError, match=message):
        MetricsHub().log("hook", {"step": 1, **record})


def test_build_hub_writes_console_and_jsonl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = build_hub(LoggingConfig(run_dir=str(tmp_path / "run")), train_iters=4, resolved={})
    hub.log("train", {"step": 1, "train_iters": 4, "loss": float("nan")})
    hub.close()
    assert capsys.readouterr().out == "step 1/4  25.0%  loss NaN\n"
    (path,) = (tmp_path / "run").iterdir()
    assert path.name == METRICS_FILE
    assert [record["kind"] for record in read_metrics(path)] == ["train"]
    assert json.loads(path.read_text())["loss"] is None


def test_build_hub_adds_tensorboard_when_asked(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    hub = build_hub(LoggingConfig(run_dir=str(tmp_path), tensorboard=True, style="megatron"), 4, {})
    hub.close()
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
