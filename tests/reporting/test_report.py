"""The report of a whole, a half and a damaged run; what its pictures hold."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_sgt.jsonl import encode
from megatron_sgt.reporting import curves, structure, style
from megatron_sgt.reporting.report import _extent, _pipeline, write_report
from megatron_sgt.reporting.run_data import load_run
from megatron_sgt.reporting.structure import COLORS
from tests.reporting.conftest import grow, grown_lines, train, write_run


class Structure(HTMLParser):
    """Open tags and outside references of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_self_contained(grown: Path) -> None:
    page, *pictures = write_report(grown)
    text = page.read_text()
    parser = Structure()
    parser.feed(text)
    assert parser.open == [] and len(parser.sources) == 6
    assert all(source.startswith("data:image/png;base64,") for source in parser.sources)
    assert {p.name for p in pictures} == {
        "loss.png", "growth.png", "entropy.png", "decisions.png", "cost.png", "speed.png",
    }  # fmt: skip
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    plain = re.sub(r"<[^>]+>", " ", text)
    for expected in (
        "60 of 60",
        "L4 deeper",
        "0, 2",
        "+6.00 %",
        "ckpt/global_step30",
        "num_layers: 5",
        "data/a",
        "98,765",
        "1.26",
    ):
        assert expected in plain, expected


@pytest.mark.parametrize(
    ("parallel", "told"),
    [
        ("{pipeline_model_parallel_size: 2, pipeline_model_parallel_layout: '3,2'}", "; pipeline 3,2 on 2 stages."),
        ("{pipeline_model_parallel_size: 2, pipeline_model_parallel_layout: [[embedding, decoder], [decoder, loss]]}",
         "; pipeline 1,1 on 2 stages."),
        ("{pipeline_model_parallel_size: 2, virtual_pipeline_model_parallel_size: 2}",
         "; pipeline auto on 2 stages with 2 chunks each."),
        ("{}", " UTC."),
        ("nothing", " UTC."),
    ],
)  # fmt: skip
def test_the_line_under_the_title_has_the_pipeline(parallel: str, told: str, tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", grown_lines(), f"parallel: {parallel}\n"))
    lead = f"Report of {run.run_dir}: {_extent(run)}{_pipeline(run)}."
    assert lead.endswith(told) and ("pipeline" in lead) is ("pipeline" in told)


def test_the_same_run_gives_the_same_page(grown: Path, tmp_path: Path) -> None:
    one, two = (write_report(grown, tmp_path / name)[0].read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_damaged_run_still_gives_a_report(tmp_path: Path) -> None:
    lines = [line[:40] if number % 3 == 0 else line for number, line in enumerate(grown_lines())]
    page = write_report(write_run(tmp_path / "run", lines, config=None))[0].read_text()
    assert "cannot be read" in page and "data:image/png" in page


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", []))[0].read_text()
    assert page.count("Nothing was recorded") == 6 and "no training step" in page


def test_a_loss_that_is_not_finite_is_drawn(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", [train(1), train(2, float("nan")), train(3)]))
    figure = curves.loss_figure(run)
    assert figure is not None
    (bad,) = [line for line in figure.axes[0].lines if line.get_label() == "loss not finite"]
    assert bad.get_xdata().tolist() == [2.0]


def test_the_loss_of_the_averaged_weights_is_a_curve_of_its_own(tmp_path: Path) -> None:
    valid = [encode("valid", {"step": s, "time": 1.0, "loss": 4.5, "ema_loss": 4.0 - s / 10}) for s in (1, 2)]
    run = load_run(write_run(tmp_path / "run", [train(1), train(2), *valid]))
    figure = curves.loss_figure(run)
    assert figure is not None
    drawn = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    assert drawn["validation loss"] == [4.5, 4.5]
    assert drawn["validation loss, averaged weights"] == [3.9, 3.8]
    assert dict(curves.headline(run))["validation loss, averaged weights"] == "3.800"


def test_growth_is_drawn_where_it_happened(grown: Path) -> None:
    figure = structure.growth_figure(load_run(grown))
    assert figure is not None
    bars = {
        (round(b.get_x()), round(b.get_x() + b.get_width()), round(b.get_y() + b.get_height() / 2))
        for b in figure.axes[0].patches
    }
    assert {(20, 41, 4), (41, 60, 4), (31, 60, 2), (20, 30, 4), (31, 41, 2)} == bars  # depths, then windows


def test_kept_heads_are_framed(grown: Path) -> None:
    figure = structure.entropy_figure(load_run(grown))
    assert figure is not None
    frames = {(p.get_x(), p.get_y(), p.get_x() + p.get_width()) for p in figure.axes[0].patches if not p.get_fill()}
    heads = 3
    assert frames == {(20, 4 * heads, 60), (20, 4 * heads + 2, 60), (31, 2 * heads + 1, 60)}


def test_the_stages_of_a_growing_model_have_rows_and_bands(staged: Path) -> None:
    text = re.sub(r"<[^>]+>", " ", write_report(staged)[0].read_text())
    flat = " ".join(text.replace("-&gt;", "->").split())
    assert "15 g_stack 5 -> 10 1.25 M -> 2.50 M 200 k -> 400 k 4.6100 -> 4.8700 2.2 s" in flat
    widths = "hidden_size 48 -> 96, num_attention_heads 3 -> 6, num_query_groups 3 -> 6"
    assert f"40 msg 10 -> 10 {widths} 1.25 M" in flat and "5 -> 10 -> 10 layers stages" in flat
    run = load_run(staged)
    assert [(s.first, s.last, s.layers) for s in run.stages] == [(0, 15, 5), (15, 40, 10), (40, 60, 10)]
    figure = curves.loss_figure(run)
    assert figure is not None
    (band,) = [patch for patch in figure.axes[0].patches if patch.get_gid() == style.STAGE]
    assert (band.get_x(), band.get_width()) == (15, 25)
    assert {"g_stack", "msg", "+L4", "+L6"} <= {text.get_text() for text in figure.axes[0].texts}


def test_phases_are_bands_with_names(tmp_path: Path) -> None:
    """Each once, whatever started again within it; FLOPs of a token with the batch of their step."""
    begun = [(0, 1, "stable", 1, 10), (10, 2, "long", 11, 20), (15, 2, "long", 11, 20), (20, 3, "annealing", 21, 60)]
    phases = [
        encode("phase", {"step": step, "number": n, "name": name, "first_step": a, "last_step": b, "settings": []})
        for step, n, name, a, b in begun
    ]
    steps = [train(1), train(10), train(15), train(20, global_batch_size=20, flops=4e9), train(40)]
    run = load_run(write_run(tmp_path / "run", [*phases, *steps]))
    figure = curves.loss_figure(run)
    assert figure is not None
    (band,) = [patch for patch in figure.axes[0].patches if patch.get_gid() == style.PHASE]
    assert (band.get_x(), band.get_width()) == (10, 10)
    names = [text for text in figure.axes[0].texts if text.get_gid() == style.PHASE]
    assert [text.get_text() for text in names] == ["stable", "long", "annealing"]
    assert len(set(run.flops_per_token()[1])) == 1
    assert curves.cost_figure(run) is not None


def test_a_growing_structure_is_drawn_in_the_numbers_of_its_time(staged: Path) -> None:
    figure = structure.growth_figure(load_run(staged))
    assert figure is not None
    axes = figure.axes[0]
    bars = {
        (round(b.get_x()), round(b.get_x() + b.get_width()), round(b.get_y() + b.get_height() / 2))
        for b in axes.patches
        if b.get_gid() is None
    }
    loops = {(10, 15, 4), (15, 40, 9), (25, 40, 6), (40, 60, 9), (40, 60, 6)}
    assert bars == {*loops, (10, 15, 4), (15, 20, 9), (25, 35, 6)}  # the first window goes on after the growth
    (missing,) = [patch for patch in axes.patches if patch.get_gid() == structure.MISSING]
    assert (missing.get_x(), missing.get_width(), missing.get_y()) == (0, 15, 4.5)
    assert [4, 9] in [list(line.get_ydata()) for line in axes.lines if list(line.get_xdata()) == [15, 15]]
    assert {t.get_text() for t in axes.texts if t.get_text().startswith("heads")} == {"heads 0, 2", "heads 1"}


def test_entropies_of_ancestors_and_of_the_model_of_the_time(staged: Path) -> None:
    run = load_run(staged)
    steps, tables = run.entropy()
    assert tables.shape == (len(steps), 10, 6) and list(steps[:4]) == [2, 5, 10, 15]
    _, measured = run.measured_entropy()
    assert (tables[0, 5:, :3] == measured[0]).all() and (tables[0, :5, :3] == measured[0]).all()
    assert np.isnan(tables[:-2, :, 3:]).all() and not np.isnan(tables[-2:]).any()
    assert run.kept_heads == {9: (10, (0, 2)), 6: (25, (1,))}
    figure = structure.entropy_figure(run)
    assert figure is not None
    frames = {(p.get_x(), p.get_y()) for p in figure.axes[0].patches if p.get_gid() == structure.FRAME}
    assert frames == {(10, 54), (10, 56), (25, 37)}
    shapes = [tuple(panel.images[0].get_array().shape) for panel in structure.snapshot_figure(run).axes if panel.images]
    assert shapes[:3] == [(5, 3), (10, 3), (10, 6)]


def test_a_growing_model_without_loops_has_its_stages_drawn(tmp_path: Path) -> None:
    stacked = grow(15, "g_stack", [*range(5)] * 2, [5, 6, 7, 8, 9], [0] * 10)
    run = load_run(write_run(tmp_path / "run", [train(10), stacked, train(30)]))
    figure = structure.growth_figure(run)
    assert figure is not None and not run.growth
    assert [p.get_gid() for p in figure.axes[0].patches].count(structure.MISSING) == 1
    damaged = grow(15, "g_stack", [*range(7)], [], [0]).replace('"heirs":[]', '"heirs":null')
    assert load_run(write_run(tmp_path / "damaged", [train(10), damaged])).grows == []


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Texts of a figure that lie over each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = []
    for ax in figure.axes:
        texts += [*ax.texts, ax.xaxis.label, ax.yaxis.label]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [
        (t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in texts if t.get_text() and t.get_visible()
    ]
    return [
        (a, b)
        for n, (a, one) in enumerate(boxes)
        for b, two in boxes[n + 1 :]
        if one.shrunk(0.9, 0.8).overlaps(two.shrunk(0.9, 0.8))
    ]


@pytest.mark.parametrize(
    "draw",
    [
        curves.loss_figure,
        curves.cost_figure,
        curves.speed_figure,
        structure.growth_figure,
        structure.entropy_figure,
        structure.snapshot_figure,
    ],
)
@pytest.mark.parametrize("run", ["grown", "large", "staged"])
def test_no_words_lie_over_each_other(draw, run: str, request: pytest.FixtureRequest) -> None:  # type: ignore[no-untyped-def]
    with style.settings():
        figure = draw(load_run(request.getfixturevalue(run)))
        assert overlapping(figure) == []


def test_a_long_run_shows_the_part_in_which_it_grows(large: Path) -> None:
    run = load_run(large)
    with style.settings():
        for figure in (structure.growth_figure(run), structure.entropy_figure(run)):
            assert figure is not None
            axes = figure.axes[0]
            assert axes.get_xlim()[1] < 1300 and "4,760" in axes.get_xlabel()
            margin = [text.get_text() for text in axes.texts if text.get_position()[0] > 1.0 and "," in text.get_text()]
            assert [text.removeprefix("heads ") for text in margin] == ["1, 2", "5, 6", "1, 2"]
            # Frames of kept heads are thinner than a head is high.
            height = 72 * axes.get_position().height * figure.get_figheight() / (24 * 16)
            assert all(p.get_linewidth() < height for p in axes.patches if p.get_gid() == structure.FRAME)


def test_colours_survive_a_grey_print() -> None:
    import matplotlib

    def grey(rgb: tuple[float, ...]) -> float:
        return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]

    shades = [grey(matplotlib.colormaps[COLORS](n / 20)[:3]) for n in range(21)]
    assert shades == sorted(shades) and shades[-1] - shades[0] > 0.6
    assert len({dash if isinstance(dash, str) else str(dash) for _, dash in style.LINES[:5]}) == 5
