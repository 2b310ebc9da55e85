"""A run directory is read as far as it can be read, and what is missing is said."""

from pathlib import Path

import numpy as np
import pytest

from megatron_sgt.errors import DataError
from megatron_sgt.reporting.run_data import load_run
from tests.reporting.conftest import HEADS, LAYERS, TOKENS, grown_lines, train, write_run


def test_what_counts(grown: Path) -> None:
    run = load_run(grown)
    assert run.notes == []
    steps, losses = run.series("train", "loss")
    assert steps.tolist() == [1, 10, 20, 30, 40, 60]
    assert 9.9 not in losses  # the steps that the resume took again
    assert [(r.step, r.lost_steps, r.path) for r in run.restarts] == [(30, 10, "ckpt/global_step30")]
    assert run.kept_heads == {4: (20, (0, 2)), 2: (31, (1,))}
    _, flops = run.series("train", "model_flops_per_step")
    assert run.flops_per_token()[1].tolist() == (flops / (10 * TOKENS)).tolist()
    assert run.last_step == 60


def test_entropies_of_reports_and_events(grown: Path) -> None:
    steps, tables = load_run(grown).entropy()
    assert steps.tolist() == [10, 20, 30, 31, 40, 41, 51]
    assert tables.shape == (7, LAYERS, HEADS)
    assert tables[0, 1, 2] == pytest.approx(0.54)


def test_sums_weigh_each_report_with_its_steps(grown: Path) -> None:
    steps, total = load_run(grown).cumulative("model_flops_per_step")
    assert steps.tolist() == [1, 10, 20, 30, 40, 60]
    expected = np.cumsum([2e9, 9 * 2e9, 10 * 2e9, 10 * 2.2e9, 10 * 2.3e9, 20 * 2.4e9])
    assert total.tolist() == pytest.approx(expected.tolist())


def test_damage_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = grown_lines()
    lines[2] = lines[2][:50]
    lines[5] = "\x00" * 20
    folder = write_run(tmp_path / "run", [*lines[:-1], train(70)[:30]], config="{ not: [yaml")
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().rstrip("\n"))  # killed in a write
    run = load_run(folder)
    assert any("2 line(s)" in note and "3, 6" in note for note in run.notes)
    assert any("config.yaml" in note for note in run.notes)
    assert any("has not ended" in note for note in run.notes)
    assert len(run.of_kind("train")) == 5


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", [], config=None))
    assert run.last_step == 0 and not len(run.flops_per_token()[0]) and not run.growth
    assert any("no training step" in note for note in run.notes)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run directory"):
        load_run(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot read the metrics file"):
        load_run(tmp_path / "empty")
