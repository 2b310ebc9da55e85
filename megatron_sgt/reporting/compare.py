"""Several runs on one page: at equal steps, at equal FLOPs and at equal time.

Training losses are noisy, so the loss of a run at a point is the mean of its last reports up to that point. The tables
show validation losses where all runs have them, else training losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_sgt.errors import ConfigError
from megatron_sgt.metrics import units
from megatron_sgt.reporting import style
from megatron_sgt.reporting.evaluation import compared_sets, compared_tasks
from megatron_sgt.reporting.page import Page
from megatron_sgt.reporting.run_data import Floats, RunData, load_run

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]

SMOOTHING = 5
"""Reports over which a training loss is averaged."""


@dataclass(frozen=True)
class Axis:
    """A quantity that runs are compared at. ``key``: the per-step average it is summed from, None for steps."""

    name: str
    key: str | None
    unit: str

    def of(self, run: RunData, steps: Floats) -> Floats:
        """The quantity reached at ``steps`` of ``run``; NaN before its first report, and after its last."""
        if self.key is None:
            return steps
        at, total = run.cumulative(self.key)
        if not len(at):
            return np.full(len(steps), np.nan)
        known = np.interp(steps, np.concatenate([[0.0], at]), np.concatenate([[0.0], total]), right=np.nan)
        return known

    def show(self, value: float) -> str:
        if self.key is None:
            return f"{value:,.0f}"
        return units.duration(value) if self.unit == "s" else units.si(value, " ") + self.unit


AXES = (
    Axis("optimizer steps", None, ""),
    Axis("model FLOPs", "model_flops_per_step", "FLOP"),
    Axis("training time", "step_time_s", "s"),
)


def write_comparison(run_dirs: Sequence[Path], output: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Write ``compare.html`` and its pictures into the folder ``output``; returns the files, the page first.

    Args:
        names: of the runs, in order; their folders' names otherwise.

    Raises:
        ConfigError: fewer than two runs, or not as many names as runs.
        DataError: a folder holds no metrics file.
    """
    if len(run_dirs) < 2:
        raise ConfigError(f"a comparison needs at least two runs, got {len(run_dirs)}")
    if names is not None and len(names) != len(run_dirs):
        raise ConfigError(f"{len(names)} names were given for {len(run_dirs)} runs")
    runs = [load_run(folder, name) for folder, name in zip(run_dirs, names or _distinct(run_dirs), strict=True)]
    with style.settings():
        page = comparison_page(runs)
    return page.write(output / "compare.html")


def _distinct(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as are needed to distinguish them."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({p[-depth:] for p in parts}) < len({*parts}):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def comparison_page(runs: Sequence[RunData]) -> Page:
    """The page of several runs; the others are compared with the first."""
    page = Page(" · ".join(run.name for run in runs), f"Compared with {runs[0].name}, the first run.")
    page.notes(f"{run.name}: {note}" for run in runs for note in run.notes)
    kind = common_kind(runs)
    for axis in AXES:
        page.picture(
            "loss_at_equal_" + axis.name.replace(" ", "_").lower(),
            f"Loss at equal {axis.name}",
            f"{'Validation' if kind == 'valid' else 'Training'} loss; small ticks on the curves are growth events, "
            "diamonds where the model itself became deeper or wider.",
            loss_figure(runs, axis, kind),
        )
    page.picture(
        "cost",
        "What a step costs",
        "Closed-form FLOPs per token, and measured seconds per step.",
        cost_figure(runs),
    )
    columns, rows = summary_table(runs, kind)
    page.table("Where the runs stand", columns, rows)
    page.table("Validation sets, last losses", *compared_sets(runs))
    page.table("Downstream tasks, last values", *compared_tasks(runs))
    for axis in AXES:
        columns, rows = equal_table(runs, axis, kind)
        page.table(f"Loss at equal {axis.name}", columns, rows)
    return page


def common_kind(runs: Sequence[RunData]) -> str:
    """The kind of record that losses are read from: "valid" if every run has validated, else "train"."""
    return "valid" if all(len(run.series("valid", "loss")[0]) for run in runs) else "train"


def losses(run: RunData, kind: str) -> tuple[Floats, Floats]:
    """(steps, losses) of ``run``; training losses are trailing means over ``SMOOTHING`` finite reports."""
    steps, values = run.series(kind, "loss")
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if kind == "train":
        values = np.array([values[max(0, n + 1 - SMOOTHING) : n + 1].mean() for n in range(len(values))])
    return steps, values


def loss_figure(runs: Sequence[RunData], axis: Axis, kind: str) -> Figure | None:
    """All runs' losses over one quantity."""
    figure, (axes,) = style.new_figure(3.8)
    drawn = False
    for run, look in zip(runs, style.line_styles(), strict=False):
        steps, values = losses(run, kind)
        x = axis.of(run, steps)
        if np.isfinite(x).any():
            drawn = True
            axes.plot(x, values, label=run.name, marker="o" if kind == "valid" else None, markersize=3.5, **look)
            _growth_ticks(axes, run, axis, steps, values, look["color"])
    if not drawn:
        return None
    axes.set_xlabel(axis.name + (" (s)" if axis.unit == "s" else ""))
    if axis.key is None:
        style.step_axis(axes, max(run.last_step for run in runs))
    else:
        style.si_axis(axes, "x")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    return figure


def _growth_ticks(axes: Axes, run: RunData, axis: Axis, steps: Floats, values: Floats, color: str) -> None:
    for found, marker, size in ((run.growth, "|", 13), (run.grows, "D", 6)):
        events = np.array([e["step"] for e in found], dtype=np.float64)
        events = events[(events >= steps[0]) & (events <= steps[-1])] if len(steps) else events[:0]
        if len(events):
            at = axis.of(run, events), np.interp(events, steps, values)
            axes.plot(*at, marker, color=color, markersize=size, linestyle="none")


def cost_figure(runs: Sequence[RunData]) -> Figure | None:
    """FLOPs per token and seconds per step of every run."""
    figure, (above, below) = style.new_figure(4.8, rows=2)
    drawn = False
    for run, look in zip(runs, style.line_styles(), strict=False):
        steps, flops = run.flops_per_token()
        if not len(steps):
            continue
        drawn = True
        above.step(steps, flops, where="pre", label=run.name, **look)
        time_steps, seconds = run.series("train", "step_time_s")
        below.plot(time_steps, seconds, label=run.name, **look)
    if not drawn:
        return None
    style.si_axis(above)
    above.set_ylabel("model FLOPs per token")
    below.set_ylabel("seconds per step")
    tops = [np.nanquantile(seconds, 0.98) for run in runs if len(seconds := run.series("train", "step_time_s")[1])]
    below.set_ylim(0, 1.15 * max(tops))
    style.step_axis(below, max(run.last_step for run in runs))
    above.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0))
    return figure


def summary_table(runs: Sequence[RunData], kind: str) -> Table:
    """(columns, rows): every run at its own end."""
    loss = "validation loss" if kind == "valid" else "training loss"
    columns = (
        "run",
        "steps",
        "tokens",
        "FLOPs",
        "FLOPs per step, last",
        "median s per step, last half",
        loss,
        "perplexity",
    )
    rows: list[tuple[str, ...]] = []
    base_flops, base_time = _last_flops(runs[0]), _median_time(runs[0])
    for run in runs:
        _, values = losses(run, kind)
        end = float(values[-1]) if len(values) else float("nan")
        train = run.of_kind("train")
        tokens = train[-1].get("consumed_tokens") if train else None
        flops = run.cumulative("model_flops_per_step")[1]
        rows.append(
            (
                run.name,
                f"{run.last_step:,}",
                "" if tokens is None else units.si(tokens, " "),
                "" if not len(flops) else units.si(float(flops[-1]), " "),
                _beside(_last_flops(run), base_flops, lambda v: units.si(v, " ")),
                _beside(_median_time(run), base_time, lambda v: f"{v:.3f}"),
                units.fixed(end, 4),
                units.perplexity(float(np.exp(end))),
            )
        )
    return columns, rows


def _last_flops(run: RunData) -> float:
    values = run.series("train", "model_flops_per_step")[1]
    return float(values[-1]) if len(values) else float("nan")


def _median_time(run: RunData) -> float:
    values = run.series("train", "step_time_s")[1]
    return float(np.median(values[len(values) // 2 :])) if len(values) else float("nan")


def _beside(value: float, base: float, show: Callable[[float], str]) -> str:
    if not np.isfinite(value):
        return ""
    text = show(value)
    return f"{text} ({100 * (value / base - 1):+.2f} %)" if np.isfinite(base) and base > 0 else text


def equal_table(runs: Sequence[RunData], axis: Axis, kind: str) -> Table:
    """(columns, rows): every run's loss at the end of the run that ended first."""
    curves = []
    for run in runs:
        steps, values = losses(run, kind)
        x = axis.of(run, steps)
        known = np.isfinite(x)
        curves.append((x[known], values[known]))
    if not all(len(x) for x, _ in curves):
        return ("run",), []
    point = min(float(x[-1]) for x, _ in curves)
    # Left of its first measurement nothing is known of a run.
    found = [float(np.interp(point, x, values, left=np.nan)) for x, values in curves]
    rows: list[tuple[str, ...]] = []
    for run, loss in zip(runs, found, strict=True):
        if np.isfinite(loss):
            gap = f"{loss - found[0]:+.4f}" if np.isfinite(found[0]) else ""
            rows.append((run.name, units.fixed(loss, 4), gap, units.perplexity(float(np.exp(loss)))))
        else:
            rows.append((run.name, "not measured so early", "", ""))
    return ("run", f"loss at {axis.show(point)}", f"against {runs[0].name}", "perplexity"), rows
