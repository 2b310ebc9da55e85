"""Runs beside each other: the numbers at equal steps, FLOPs and time."""

from pathlib import Path

import numpy as np
import pytest

from megatron_sgt.errors import ConfigError
from megatron_sgt.reporting.compare import (
    AXES,
    common_kind,
    equal_table,
    loss_figure,
    summary_table,
    write_comparison,
)
from megatron_sgt.reporting.run_data import load_run
from tests.reporting.conftest import train, write_run


def test_the_page(vanilla: Path, grown: Path, tmp_path: Path) -> None:
    page, *pictures = write_comparison([vanilla, grown], tmp_path / "out", ["plain", "sgt"])
    text = page.read_text()
    assert page.name == "compare.html" and len(pictures) == 4
    assert text.count("data:image/png;base64,") == 4 and "Compared with plain" in text


@pytest.mark.parametrize(
    ("axis", "point"),
    list(zip(AXES, ("50", "100 GFLOP", "20s"), strict=True)),
    ids=lambda v: getattr(v, "name", v),
)
def test_equal_points(axis, point: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Validation losses 4.5 at step 30 and 4.1 at step 70, against a run that ends at step 50."""
    from megatron_sgt.jsonl import encode

    def valid(step: int, value: float) -> str:
        return encode("valid", {"step": step, "loss": value, "perplexity": 1.0})

    base = write_run(tmp_path / "a", [train(50, seconds=0.4), valid(50, 4.4)])
    other = write_run(tmp_path / "b", [train(100, flops=2e9, seconds=0.4), valid(30, 4.5), valid(70, 4.1)])
    runs = [load_run(base), load_run(other)]
    (_, head, *_), rows = equal_table(runs, axis, "valid")
    assert head == f"loss at {point}"
    assert rows[0][1:3] == ("4.4000", "+0.0000")
    assert float(rows[1][1]) == pytest.approx(4.5 - 0.4 * 20 / 40)


def test_nothing_is_said_of_a_run_before_its_first_measurement(tmp_path: Path) -> None:
    from megatron_sgt.jsonl import encode

    def run(name: str, step: int, flops: float) -> Path:
        lines = [train(step, flops=flops), encode("valid", {"step": step, "loss": 4.0, "perplexity": 1.0})]
        return write_run(tmp_path / name, lines)

    runs = [load_run(run("cheap", 50, 2e9)), load_run(run("dear", 50, 3e9))]
    _, rows = equal_table(runs, AXES[1], "valid")
    assert rows[0][1] == "4.0000" and rows[1][1] == "not measured so early"


def test_overheads_beside_the_first_run(vanilla: Path, grown: Path) -> None:
    runs = [load_run(vanilla), load_run(grown)]
    _, rows = summary_table(runs, common_kind(runs))
    assert rows[0][4] == "2.00 G (+0.00 %)"
    assert rows[1][4] == "2.40 G (+20.00 %)" and rows[1][5] == "0.500 (+25.00 %)"
    assert rows[1][6] == "4.1000"


def test_training_losses_where_a_run_has_not_validated(vanilla: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", [train(s, loss) for s, loss in ((10, 6.0), (20, 5.0), (30, 4.0))])
    runs = [load_run(vanilla), load_run(other)]
    assert common_kind(runs) == "train"
    _, rows = summary_table(runs, "train")
    assert rows[1][6] == "5.0000"  # the mean of the last reports


def test_names(vanilla: Path, grown: Path, tmp_path: Path) -> None:
    twin = write_run(tmp_path / "x" / "vanilla", [train(1)])
    page = write_comparison([vanilla, twin], tmp_path / "out")[0].read_text()
    assert "x/vanilla" in page
    with pytest.raises(ConfigError, match="at least two"):
        write_comparison([vanilla], tmp_path / "out")
    with pytest.raises(ConfigError, match="1 names were given for 2 runs"):
        write_comparison([vanilla, grown], tmp_path / "out", ["one"])


def test_flops_of_all_stages_count_and_growths_have_diamonds(vanilla: Path, staged: Path) -> None:
    """15 steps of a small model, 25 of a deeper, 20 of a wider one; each record stands for the steps before it."""
    runs = [load_run(vanilla), load_run(staged)]
    flops = AXES[1].of(runs[1], np.array([10.0, 15.0, 40.0, 60.0]))
    spent = [10 * 2e9, 5 * 2.1e9, 10 * 4e9 + 15 * 4.2e9, 20 * 7e9]
    assert flops.tolist() == pytest.approx(np.cumsum(spent).tolist())
    figure = loss_figure(runs, AXES[1], "train")
    assert figure is not None
    (diamonds,) = [line for line in figure.axes[0].lines if line.get_marker() == "D"]
    assert diamonds.get_xdata().tolist() == pytest.approx(flops[1:3].tolist())
