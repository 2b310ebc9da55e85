"""The report of one run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_sgt.config.pipeline import AUTO
from megatron_sgt.metrics import units
from megatron_sgt.metrics.lines import began
from megatron_sgt.reporting import style
from megatron_sgt.reporting.curves import cost_figure, headline, loss_figure, speed_figure
from megatron_sgt.reporting.evaluation import sets_figure, tasks_figure, tasks_rows
from megatron_sgt.reporting.page import Page
from megatron_sgt.reporting.run_data import RunData, load_run
from megatron_sgt.reporting.structure import (
    entropy_figure,
    growth_figure,
    growth_rows,
    snapshot_figure,
    stage_rows,
)

_BANDS = "Where the model became deeper or wider a thick line has the operator's name, and every second stage a band. "
_NUMBERS = " Layers have the numbers of the model of that time; a line leads to where a loop goes on."
_ANCESTORS = " Layers are those of the last model, each with the entropies of what it is a copy of."


def write_report(run_dir: Path, output: Path | None = None) -> list[Path]:
    """Write ``report/report.html`` and its pictures into ``run_dir`` or ``output``; returns the files, the page first.

    Raises:
        DataError: the folder holds no metrics file.
        OSError: the pictures cannot be written.
    """
    run = load_run(run_dir)
    with style.settings():
        page = build_page(run)
    return page.write((output or run_dir / "report") / "report.html")


def build_page(run: RunData) -> Page:
    """The page of one run. It names the parts that the run directory lacks."""
    page = Page(run.name, f"Report of {run.run_dir}: {_extent(run)}{_pipeline(run)}.{_began(run)}")
    page.notes(run.notes)
    page.cards(headline(run))
    page.picture(
        "loss",
        "Loss",
        "Dashed lines are growth events: +L5 is the selection of layer 5, triangles are restarts. "
        f"{_BANDS if run.grows else ''}The first two per cent of a long run may lie above the picture.",
        loss_figure(run),
    )
    for name, heading, figure in (
        ("validation_sets", "Validation sets", sets_figure(run)),
        ("tasks", "Downstream tasks", tasks_figure(run)),
    ):
        if figure is not None:
            page.picture(name, heading, "As the run measured them, with the structure of inference.", figure)
    page.picture(
        "growth",
        "Growth",
        "In the hatched window all heads of the layer loop, and the gates of those that are not "
        "kept fade to 0. Then only the kept heads loop."
        + (
            " Layers have the numbers of the model of that time; a line leads to where a loop goes on."
            if run.grows
            else ""
        ),
        growth_figure(run),
    )
    page.picture(
        "entropy",
        "Attention entropy",
        "EMA of the entropy of the last query row, 0 (one token) to 1 (uniform). "
        "Kept heads are framed from the step of their selection on."
        + (
            " Layers are those of the last model, each with the entropies of what it is a copy of." if run.grows else ""
        ),
        entropy_figure(run),
    )
    page.picture(
        "decisions",
        "What each decision saw",
        "The entropies at each growth event, kept heads framed.",
        snapshot_figure(run),
    )
    page.picture(
        "cost",
        "What loops cost",
        "Above: closed form, averaged over each log interval. Below: measured.",
        cost_figure(run),
    )
    page.picture("speed", "Speed and memory", "As logged by rank 0.", speed_figure(run))
    _event_tables(page, run)
    page.table("Restarts", ("resumed at step", "when (UTC)", "steps taken again", "from"), _restart_rows(run))
    page.table("Checkpoints", ("step", "size", "seconds", "path"), _save_rows(run))
    if run.config_text is not None:
        page.text("Configuration", run.config_text)
    return page


def _event_tables(page: Page, run: RunData) -> None:
    page.table("Tasks, last values", ("task", "metric", "value", "step"), tasks_rows(run))
    page.table(
        "Stages",
        ("step", "operator", "layers", "widths", "parameters", "FLOPs per token", "loss of the probe", "took"),
        stage_rows(run),
    )
    page.table(
        "Growth events",
        ("step", "decision", "kept heads", "layer score", "depth", "FLOPs of all loops"),
        growth_rows(run),
    )
    page.table("Data", ("source", "tokens", "epochs"), _source_rows(run))


def _extent(run: RunData) -> str:
    times = [float(r["time"]) for r in run.records if isinstance(r.get("time"), int | float)]
    steps = f"{run.last_step:,} steps"
    if not times:
        return steps
    return f"{steps}, {_utc(times[0])} to {_utc(times[-1])} UTC"


def _began(run: RunData) -> str:
    """With whose weights the run began; "" with none."""
    found = [record["origin"] for record in run.of_kind("resume") if record.get("origin")]
    return f" It began with {began(found[0])}." if found else ""


def _pipeline(run: RunData) -> str:
    """How the configuration cuts the model; "" without a pipeline."""
    parallel = run.config.get("parallel")
    parallel = parallel if isinstance(parallel, Mapping) else {}
    size, chunks = (parallel.get(f"{name}pipeline_model_parallel_size", 1) for name in ("", "virtual_"))
    if size == 1:
        return ""
    each = f" with {chunks} chunks each" if chunks != 1 else ""
    return f"; pipeline {_layers(parallel.get('pipeline_model_parallel_layout', AUTO))} on {size} stages{each}"


def _layers(layout: Any) -> str:
    """A layout on a line: Megatron-Core's list as the number of layers of each part."""
    if not isinstance(layout, list):
        return str(layout)
    return ",".join(str(part.count("decoder") if isinstance(part, list) else part) for part in layout)


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%d %H:%M")


def _restart_rows(run: RunData) -> list[tuple[str, ...]]:
    return [
        (f"{r.step:,}", "" if r.time is None else _utc(r.time), f"{r.lost_steps:,}", r.path or "fresh start")
        for r in run.restarts
    ]


def _source_rows(run: RunData) -> list[tuple[str, ...]]:
    """How far the last checkpoint has come in each source."""
    saves = [record for record in run.of_kind("save") if record.get("source_tokens")]
    epochs = (saves[-1].get("source_epochs") or {}) if saves else {}
    return [
        (source, f"{tokens:,}", units.fixed(epochs[source], 2) if epochs.get(source) is not None else "")
        for source, tokens in (saves[-1]["source_tokens"] if saves else {}).items()
    ]


def _save_rows(run: RunData) -> list[tuple[str, ...]]:
    return [
        (
            f"{record['step']:,}",
            units.file_size(record["bytes"]) if record.get("bytes") is not None else "",
            units.fixed(record["seconds"], 1) if record.get("seconds") is not None else "",
            str(record.get("path") or ""),
        )
        for record in run.of_kind("save")
    ]
