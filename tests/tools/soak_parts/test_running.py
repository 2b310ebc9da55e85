from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from soak_parts import running
from soak_parts.running import Lost, Running
from soak_parts.workload import LAYOUTS, small_config

from megatron_sgt.jsonl import JsonlWriter
from megatron_sgt.metrics import METRICS_FILE


@pytest.fixture
def run(tmp_path: Path) -> Running:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").touch()
    run = Running(small_config(tmp_path / "run", "data", LAYOUTS["dp2-zero1"], {}), 0.1)
    run.ranks = SimpleNamespace(alive=lambda: True)
    return run


def test_it_begins_without_what_was_there(run: Running) -> None:
    assert not run.run_dir.exists() and run.config.exists()
    assert (run.records(), run.step(), run.is_saving()) == ([], 0, False)


def test_records_are_read_once_and_whole(run: Running) -> None:
    run.run_dir.mkdir()
    writer = JsonlWriter(run.run_dir / METRICS_FILE)
    writer.write("resume", {"step": 4})
    assert run.step() == 4
    writer.write("train", {"step": 5, "loss": 1.5})
    writer.write("save", {"step": 5, "seconds": 0.7})
    writer.close()
    with (run.run_dir / METRICS_FILE).open("a") as file:
        file.write('{"kind":"train","st')
    assert [record["kind"] for record in run.records()] == ["resume", "train", "save"]
    assert (run.step(), run.save_seconds()) == (5, 0.7)
    with (run.run_dir / METRICS_FILE).open("a") as file:
        file.write('ep":6}\n')
    assert run.step() == 6


def test_a_wait_ends_with_a_rank_or_with_patience(run: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    run.log.write_text("last words")
    assert run.wait(lambda: True)
    monkeypatch.setattr(running, "PATIENCE", 0.05)
    with pytest.raises(Lost, match="nothing moves at step 0:\nlast words"):
        run.wait_steps(1)
    run.ranks.alive = lambda: False
    assert not run.wait_steps(1)
