"""Named validation sets and tasks in the report of a run, and in a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.jsonl import encode
from megatron_sgt.reporting import style
from megatron_sgt.reporting.compare import comparison_page
from megatron_sgt.reporting.evaluation import (
    SPLIT,
    compared_sets,
    compared_tasks,
    sets_figure,
    tasks_figure,
    tasks_rows,
)
from megatron_sgt.reporting.report import build_page
from megatron_sgt.reporting.run_data import RunData, load_run
from tests.reporting.conftest import train


def evaluated(folder: Path, worse: float = 0.0, **more: Any) -> RunData:
    lines = [train(step, 4.0 - step / 50) for step in (10, 20)]
    for step in (0, 10, 20):
        sets = {"wiki": {"loss": 3.0 - step / 40 + worse, "perplexity": 9.0, "bits_per_byte": 1.25}}
        sets |= {"code": {"loss": 2.0, "perplexity": 7.4}}
        lines.append(encode("valid", {"step": step, "time": 1.7e9, "loss": 3.5, "perplexity": 33.1, "sets": sets}))
    for step in (10, 20):
        results = {"words": {"acc": 0.5 + step / 100, "acc_stderr": 0.1}, "own": {"my_metric": 7.0}}
        lines.append(encode("tasks", {"step": step, "time": 1.7e9, "results": results}))
    lines.append(encode("tasks", {"step": 20, "time": 1.7e9, "failed": "no such file"}))
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return load_run(folder)


@pytest.fixture
def run(tmp_path: Path) -> RunData:
    return evaluated(tmp_path / "a")


def test_a_curve_for_each_set(run: RunData) -> None:
    figure = sets_figure(run)
    assert figure is not None
    losses, bits = figure.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in losses.get_lines()}
    assert drawn[SPLIT] == [3.5] * 3 and drawn["wiki"] == [3.0, 2.75, 2.5] and drawn["code"] == [2.0] * 3
    assert [line.get_label() for line in bits.get_lines()] == ["wiki"]


def test_a_curve_for_each_task(run: RunData) -> None:
    figure = tasks_figure(run)
    assert figure is not None
    drawn = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].get_lines()}
    assert drawn == {"words acc": [0.6, 0.7], "own my_metric": [7.0, 7.0]}
    assert tasks_rows(run)[0] == ("words", "acc", "0.700", "20") and len(tasks_rows(run)) == 3


def test_pages(run: RunData, tmp_path: Path) -> None:
    other = evaluated(tmp_path / "b", worse=0.5)
    assert compared_sets([run, other]) == (
        ("run", "wiki", "code"),
        [("a", "2.5000 (1.250 bits/byte)", "2.0000"), ("b", "3.0000 (1.250 bits/byte)", "2.0000")],
    )
    assert compared_tasks([run, other])[1][1] == ("b", "acc 0.700", "my_metric 7.00")
    with style.settings():
        build_page(run).write(tmp_path / "report.html")
        comparison_page([run, other]).write(tmp_path / "compare.html")
    report, compared = ((tmp_path / name).read_text() for name in ("report.html", "compare.html"))
    assert "Validation sets" in report and "validation loss, wiki" in report and "Downstream tasks" in report
    assert "Validation sets, last losses" in compared and "my_metric 7.00" in compared


def test_a_run_without_them_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(train(10))
    plain = load_run(tmp_path)
    assert sets_figure(plain) is tasks_figure(plain) is None
    assert compared_sets([plain])[1] == compared_tasks([plain])[1] == tasks_rows(plain) == []
