"""The study as a user starts it: trains, writes the table, and writes the same one again."""

import re
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, run_process
from tests.helpers.runs import tiny_config, write_tiny_data

STEPS = 14


@pytest.mark.exhaustive
def test_table_is_reproducible_to_the_digit(tmp_path: Path) -> None:
    train = {
        "train_iters": STEPS, "micro_batch_size": 4, "global_batch_size": 8, "eval_interval": STEPS, "eval_iters": 2,
        "threads_per_rank": 1,
    }  # fmt: skip
    config = tiny_config(tmp_path / "run", write_tiny_data(tmp_path), train=train, checkpoint={"save_interval": 0})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    tables = []
    for name in ("one", "two"):
        command = [sys.executable, str(ROOT / "tools/study.py"), "--config", "c.yaml", "--output", name]
        command += ["--presets", "vanilla,sgt", "--seeds", "1", "--at-once", "2"]
        done = run_process(command, tmp_path)
        assert done.code == 0, done.err + done.out
        assert "complete" in done.out
        tables.append((tmp_path / name / "table.md").read_text())
        assert (tmp_path / name / "compare" / "compare.html").exists()
        assert "vanilla | +0.00 %" in (tmp_path / name / "times.md").read_text()
    assert tables[0] == tables[1] and "| sgt | 1 | +" in tables[0] and "| vanilla | 1 | +0.00 % |" in tables[0]


@pytest.mark.exhaustive
def test_ways_to_grow_are_compared_at_equal_flops(tmp_path: Path) -> None:
    train = {
        "train_iters": 60, "micro_batch_size": 4, "global_batch_size": 8, "eval_interval": 60, "eval_iters": 2,
        "threads_per_rank": 1,
    }  # fmt: skip
    config = tiny_config(
        tmp_path / "run",
        write_tiny_data(tmp_path),
        model={"num_layers": 8},
        train=train,
        checkpoint={"save_interval": 0},
    )
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    command = [sys.executable, str(ROOT / "tools/study.py"), "--growing", "--config", "c.yaml", "--output", "2024"]
    done = run_process([*command, "--seeds", "1", "--at-once", "2"], tmp_path, timeout=600)
    assert done.code == 0, done.err + done.out
    table = (tmp_path / "2024/table.md").read_text()
    shown = dict(re.findall(r"^\| (\S+) \| [^|]*: [^|]* \| 1 \| ([+-]\d\.\d\d) % \|", table, re.MULTILINE))
    assert len(shown) == 7 and all(abs(float(percent)) < 1.0 for percent in shown.values()), table
