"""Validation sets by name and downstream tasks: their curves over the steps of a run, their last values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from megatron_sgt.metrics import units
from megatron_sgt.reporting import style
from megatron_sgt.reporting.run_data import Floats, RunData

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
Curves = dict[str, tuple[Floats, Floats]]

SPLIT = "validation split"
_MAIN_METRICS = ("acc_norm", "acc", "exact_match", "bits_per_byte", "word_perplexity", "f1")
"""Of a task that has several, the first of these is drawn."""


def sets_figure(run: RunData) -> Figure | None:
    """One curve for each set of data.valid and the validation split; where known, bits per byte below."""
    names = run.names("valid", "sets")
    if not names:
        return None
    rows = []
    for key, label in (("loss", "loss (nats per token)"), ("bits_per_byte", "bits per byte")):
        of_split = {SPLIT: run.series("valid", key)}
        curves: Curves = of_split | {name: run.series_of("valid", "sets", name, key) for name in names}
        curves = {name: curve for name, curve in curves.items() if len(curve[0])}
        if curves:
            rows.append((curves, label))
    return _figure(run, rows) if rows else None


def tasks_figure(run: RunData) -> Figure | None:
    """One curve for each task, of its main metric."""
    curves: Curves = {}
    for name in run.names("tasks", "results"):
        metric = main_metric(run, name)
        if metric is not None:
            curves[f"{name} {metric}"] = run.series_of("tasks", "results", name, metric)
    return _figure(run, [(curves, "metric of the task")]) if curves else None


def _figure(run: RunData, rows: Sequence[tuple[Curves, str]]) -> Figure:
    figure, axes = style.new_figure(1.0 + 2.6 * len(rows), rows=len(rows))
    for ax, (curves, label) in zip(axes, rows, strict=True):
        style.mark_growth(ax, run, labels=ax is axes[0])
        for (name, (steps, values)), look in zip(curves.items(), style.line_styles(), strict=False):
            ax.plot(steps, values, label=name, marker="o", markersize=3.5, **look)
        ax.set_ylabel(label)
        ax.legend(loc="best", ncols=2)
    style.mark_restarts(axes[-1], run)
    style.step_axis(axes[-1], run.last_step)
    return figure


def main_metric(run: RunData, task: str) -> str | None:
    """The metric of ``task`` that is drawn and compared; None without one."""
    found = [record["results"][task] for record in run.of_kind("tasks") if task in (record.get("results") or {})]
    measured = [key for key in found[-1] if not key.endswith("_stderr")] if found else []
    return next((key for key in _MAIN_METRICS if key in measured), measured[0] if measured else None)


def tasks_rows(run: RunData) -> list[tuple[str, ...]]:
    """(task, metric, value, step) of every task's last values."""
    rows = []
    for record in run.of_kind("tasks"):
        for task, values in (record.get("results") or {}).items():
            for metric, value in values.items():
                rows.append(((task, metric), (task, metric, units.significant(value), f"{record['step']:,}")))
    return list(dict(rows).values())


def compared_sets(runs: Sequence[RunData]) -> Table:
    """(columns, rows): the last loss of every run on every named set, beside its bits per byte."""
    return _compared(runs, "valid", "sets", _last_of_set)


def compared_tasks(runs: Sequence[RunData]) -> Table:
    """(columns, rows): the last value of every run on every task."""
    return _compared(runs, "tasks", "results", _last_of_task)


def _compared(runs: Sequence[RunData], kind: str, field: str, cell: Callable[[RunData, str], str]) -> Table:
    names = list(dict.fromkeys(name for run in runs for name in run.names(kind, field)))
    return ("run", *names), [(run.name, *(cell(run, name) for name in names)) for run in runs if names]


def _last_of_set(run: RunData, name: str) -> str:
    loss, bits = (run.series_of("valid", "sets", name, key)[1] for key in ("loss", "bits_per_byte"))
    if not len(loss):
        return ""
    return units.fixed(float(loss[-1]), 4) + (f" ({units.fixed(float(bits[-1]), 3)} bits/byte)" if len(bits) else "")


def _last_of_task(run: RunData, name: str) -> str:
    metric = main_metric(run, name)
    values = np.array([]) if metric is None else run.series_of("tasks", "results", name, metric)[1]
    return f"{metric} {units.significant(float(values[-1]))}" if len(values) else ""
