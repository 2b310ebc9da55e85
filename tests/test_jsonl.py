"""Metrics files are strict JSON, survive a kill and a full disk, and are unambiguous after a resume."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sgt.errors import DataError
from megatron_sgt.jsonl import JsonlWriter, decode, encode, read_metrics


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def steps(path: Path) -> list[tuple[str, int]]:
    return [(record["kind"], record["step"]) for record in read_metrics(path)]


def write(path: Path, *records: tuple[str, int]) -> None:
    writer = JsonlWriter(path)
    for kind, step in records:
        writer.write(kind, {"step": step})
    writer.close()


def test_lines_are_strict_json_and_come_back_whole() -> None:
    record = {
        "loss": math.nan,
        "step": 7,
        "grad_norm": np.float32("inf"),
        "time": 1.5,
        "ema": np.array([[0.5, -math.inf]]),
        "nested": {"a": [1, (2.0, math.nan)]},
        "path": Path("runs") / "x",
        "mfu": None,
        "flag": True,
        "count": np.int64(3),
    }
    line = encode("train", record)
    raw = json.loads(line, parse_constant=refuse_constant)
    assert list(raw)[:3] == ["kind", "step", "time"]
    assert raw["loss"] is None
    assert raw["nonfinite"] == {
        "loss": "NaN", "grad_norm": "Infinity", "ema/0/1": "-Infinity", "nested/a/1/1": "NaN",
    }  # fmt: skip
    back = decode(line)
    assert math.isnan(back["loss"]) and math.isnan(back["nested"]["a"][1][1])
    assert back["grad_norm"] == math.inf and back["ema"] == [[0.5, -math.inf]]
    assert (back["path"], back["mfu"], back["flag"], back["count"]) == ("runs/x", None, True, 3)
    assert "nonfinite" not in back


def test_a_finite_record_has_no_extra_field() -> None:
    assert encode("train", {"step": 1, "loss": 2.5}) == '{"kind":"train","step":1,"loss":2.5}'


def test_what_is_no_host_data_is_refused() -> None:
    with pytest.raises(TypeError):
        encode("train", {"step": 1, "loss": object()})


def test_records_are_on_disk_at_once_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write("train", {"step": 1})
    writer.advance(2)
    assert steps(path) == [("train", 1)]
    writer.close()
    write(path, ("train", 2))
    assert steps(path) == [("train", 1), ("train", 2)]


@pytest.mark.parametrize("torn", ['{"kind":"train","st', "\0" * 70_000, '{"a":1}', "\udcff"])
def test_a_torn_last_line_is_ignored_and_then_cut_off(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, ("train", 1), ("train", 2))
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode(errors="surrogateescape"))
    assert steps(path) == [("train", 1), ("train", 2)]
    write(path, ("train", 3))
    assert path.read_bytes() == whole + b'{"kind":"train","step":3}\n'


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind":')
    assert read_metrics(path) == []
    JsonlWriter(path).close()
    assert path.read_bytes() == b""


def test_a_resume_voids_later_records_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, ("resume", 0), ("train", 10), ("save", 10), ("train", 20), ("growth", 20))
    write(path, ("resume", 10), ("train", 20), ("save", 20), ("train", 30))
    write(path, ("resume", 20), ("summary", 40))
    assert steps(path) == [
        ("resume", 0), ("train", 10), ("save", 10), ("resume", 10), ("train", 20), ("save", 20),
        ("resume", 20), ("summary", 40),
    ]  # fmt: skip


def test_a_fresh_start_voids_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, ("valid", 0), ("train", 10), ("resume", 0), ("train", 1))
    assert steps(path) == [("resume", 0), ("train", 1)]


@pytest.mark.parametrize("bad", ["{", "[1]", '{"step":1}', '{"kind":"train","nonfinite":{"a/b":"NaN"}}'])
def test_a_damaged_line_inside_the_file_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"kind":"train","step":1}}\n{bad}\n{{"kind":"train","step":2}}\n')
    with pytest.raises(DataError, match="line 2 is no metrics record"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: No such file"):
        read_metrics(tmp_path / "nowhere.jsonl")


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write("train", {"step": 1})
    real = writer._file._file

    class Full:
        """Takes half of what it is given, as a file on a full disk does."""

        def write(self, data: bytes) -> int:
            return real.write(data[: len(data) // 2])

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    writer._file._file = Full()
    with pytest.raises(OSError, match="No space left"):
        writer.write("train", {"step": 2})
    writer._file._file = real
    writer.write("train", {"step": 3})
    writer.close()
    assert path.read_bytes() == b'{"kind":"train","step":1}\n{"kind":"train","step":3}\n'


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_file_that_went_is_made_again_and_said(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write("train", {"step": 1})
    path.parent.rename(tmp_path / "moved")
    if how == "deleted":
        (tmp_path / "moved/metrics.jsonl").unlink()
    if how == "replaced":
        path.parent.mkdir()
        path.write_text('{"kind":"train","step":5}\n')
    for step in (2, 3):
        writer.write("train", {"step": step})
    writer.close()
    assert steps(path) == [("train", 5)] * (how == "replaced") + [("train", 2), ("train", 3)]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and str(path) in said[0] and "begins at step 2" in said[0]
