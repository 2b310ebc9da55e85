"""The report of a whole, a half and a damaged run; what its pictures hold."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from megatron_sgt.jsonl import encode
from megatron_sgt.reporting import curves, structure, style
from megatron_sgt.reporting.report import write_report
from megatron_sgt.reporting.run_data import load_run
from megatron_sgt.reporting.structure import COLORS
from tests.reporting.conftest import grown_lines, train, write_run


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
    for expected in ("60 of 60", "L4 deeper", "0, 2", "+6.00 %", "ckpt/global_step30", "num_layers: 5"):
        assert expected in plain, expected


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
@pytest.mark.parametrize("run", ["grown", "large"])
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
