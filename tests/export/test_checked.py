"""An export keeps its name only if it is the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sgt.errors import CheckpointError
from megatron_sgt.export import checked
from megatron_sgt.export.checked import Mode, checked_export
from megatron_sgt.export.to_hf import ExportOptions
from tests.export.test_parity import other_heads
from tests.helpers.exports import export_config, write_run

FP32 = ExportOptions(dtype="fp32")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "ckpt", export_config("multi_head"))
    return tmp_path / "ckpt"


@pytest.mark.parametrize("mode", ["full", "layers", "skip"])
def test_modes(run: Path, tmp_path: Path, mode: Mode) -> None:
    _, parity = checked_export(run, tmp_path / "out", options=FP32, mode=mode)
    assert (parity.mode if parity else "skip") == mode
    assert (tmp_path / "out" / "parity.json").exists() == (mode != "skip")


def test_another_model_loses_its_name(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checked.export_checkpoint

    def wrong(*args, **kwargs):  # type: ignore[no-untyped-def]
        export = real(*args, **kwargs)
        other_heads(export.folder)
        return export

    monkeypatch.setattr(checked, "export_checkpoint", wrong)
    _, parity = checked_export(run, tmp_path / "out", options=FP32)
    assert parity is not None and not parity.passed
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt", "out.failed"}
    assert json.loads((tmp_path / "out.failed" / "parity.json").read_text())["passed"] is False
    with pytest.raises(CheckpointError, match=r"out\.failed of an earlier export exists"):
        checked_export(run, tmp_path / "out", options=FP32)


def test_a_comparison_that_breaks_off_is_a_failed_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(export: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(checked, "check_parity", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        checked_export(run, tmp_path / "out", options=FP32)
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt", "out.failed"}
