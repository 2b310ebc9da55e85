"""Colours, sizes and the marks that every picture shares.

The colours are those of Okabe and Ito (2008), which colour-blind readers can distinguish; lines that share a picture
also differ in dash and lightness, so that a grey print is readable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_sgt.metrics import units
from megatron_sgt.reporting.run_data import RunData

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"

LINES = (
    (BLUE, "-"),
    (VERMILION, "--"),
    (GREEN, "-."),
    (BLACK, ":"),
    (PURPLE, (0, (5, 1, 1, 1))),
    (ORANGE, "-"),
    (SKY, "--"),
    (GREY, "-."),
)
"""(colour, dash) of the runs of a comparison, in order."""

BAND, STAGE_TEXT = "#F0EEF4", "#8A3F70"
STAGE, PHASE = "stage", "phase"
"""Names of the bands of stages and phases in the pictures' lists of patches."""

WIDTH = 9.0
"""Inches; with DPI, pixels of the pictures in a page."""
DPI = 130

_SETTINGS: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "svg.hashsalt": "megatron_sgt",
}


@contextmanager
def settings() -> Iterator[None]:
    """matplotlib's settings for the pictures made inside; the caller's are restored."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(height: float, rows: int = 1, ratios: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    """A figure of the common width with ``rows`` axes above each other that share their x axis."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=ratios)
    return figure, [row[0] for row in axes]


def line_styles() -> Iterator[dict[str, Any]]:
    """Keyword arguments of one line after the other."""
    for color, dash in cycle(LINES):
        yield {"color": color, "linestyle": dash, "linewidth": 1.6}


def step_axis(axes: Axes, last_step: int) -> None:
    """An x axis of optimizer steps from 0 to ``last_step``."""
    axes.set_xlim(0, max(1, last_step))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("optimizer step")


def si_axis(axes: Axes, what: str = "y") -> None:
    """Ticks with decimal prefixes: 1.2k, 3.4M."""
    axis = axes.yaxis if what == "y" else axes.xaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: units.si(value) if value else "0"))


def mark_growth(axes: Axes, run: RunData, labels: bool = False, end: int | None = None) -> None:
    """A thin vertical line at every growth event; with ``labels``, what was decided, above the axes.

    Where the model itself became deeper or wider the line is thick, and every second stage lies on a grey band. So does
    every second phase; with ``labels`` their names stand at the lower edge.

    ``end``: where the step axis ends, by default with the run. Labels that would overlap are put on a second and
    third level.
    """
    end = end or run.last_step
    _mark_phases(axes, run, labels, end)
    for stage in run.stages[1::2]:
        axes.axvspan(stage.first, min(stage.last, end), color=BAND, linewidth=0, zorder=0).set_gid(STAGE)
    level_ends = [-1.0, -1.0, -1.0]
    for event in sorted([*run.growth, *run.grows], key=lambda event: float(event["step"])):
        step, grows = event["step"], event in run.grows
        look: dict[str, Any] = {"color": PURPLE, "linewidth": 1.8} if grows else {"color": GREY, "linewidth": 0.9}
        axes.axvline(step, linestyle="-" if grows else (0, (4, 2)), zorder=1, **look)
        if not labels:
            continue
        text = event_label(event)
        width = 0.0125 * len(text)
        position = step / max(1, end)
        level = next((n for n, taken in enumerate(level_ends) if position > taken), 2)
        level_ends[level] = position + width
        axes.annotate(
            text,
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, 3 + 11 * level),
            textcoords="offset points",
            fontsize=8,
            color=STAGE_TEXT if grows else "#444444",
            fontweight="bold" if grows else "normal",
            annotation_clip=False,
        )


def _mark_phases(axes: Axes, run: RunData, labels: bool, end: int) -> None:
    for index, phase in enumerate(run.phases):
        first, last = phase["first_step"] - 1, min(phase["last_step"], end)
        if index % 2:
            axes.axvspan(first, last, color=BAND, linewidth=0, zorder=0).set_gid(PHASE)
        if labels and first < last:
            text = axes.annotate(
                str(phase["name"]),
                ((first + last) / 2, 0.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color="#444444",
            )
            text.set_gid(PHASE)


def event_label(event: Any) -> str:
    """A few characters for one growth event: "+L19", "L19 deeper", "fixed"; the operator of a new stage."""
    if "operator" in event:
        return str(event["operator"])
    layer = event.get("layer")
    if layer is None:
        return str(event.get("action", "")).replace("_", " ")
    return f"L{layer} deeper" if event.get("action") == "increase_depth" else f"+L{layer}"


def mark_restarts(axes: Axes, run: RunData, end: int | None = None) -> None:
    """A small triangle on the x axis at every restart; ``end``: where the axis ends, by default with the run."""
    steps = [start.step for start in run.restarts if end is None or start.step <= end]
    if steps:
        axes.plot(
            steps,
            [0.0] * len(steps),
            marker="^",
            linestyle="none",
            color=VERMILION,
            markersize=7,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            label="restart",
            zorder=5,
        )
