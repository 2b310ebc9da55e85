"""Pictures of the structure that grew: entropies of heads over steps, and loops over steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke

from megatron_sgt.metrics import units
from megatron_sgt.reporting import style
from megatron_sgt.reporting.run_data import Floats, Record, RunData, StageSpan

COLORS = "cividis"
"""Grows in lightness from end to end, so it survives a grey print."""
MAX_SNAPSHOTS = 8
MISSING = "missing layers"
"""Name of the areas of layers that a model has not got yet."""
FRAME = "kept head"
"""Name of the frames around kept heads in the pictures' lists of patches."""
NAMED = 6
"""Kept heads of a layer that are listed, not counted."""
THIN = 6.0
"""Points; a head that has less height in the picture of entropies is named in the margin."""


def entropy_figure(run: RunData) -> Figure | None:
    """EMA entropies [layer x head] over steps, kept heads outlined from their selection on."""
    steps, tables = run.entropy()
    if not len(steps):
        return None
    _, layers, heads = tables.shape
    figure, (axes,) = style.new_figure(min(9.0, max(3.6, 1.6 + 0.028 * layers * heads + 0.12 * layers)))
    edges = np.concatenate([[max(0.0, 1.5 * steps[0] - 0.5 * steps[1]) if len(steps) > 1 else 0.0], _edges(steps)])
    for grow in run.grows:  # no column is of two models
        before = int(np.searchsorted(steps, grow["step"], side="right"))
        if 0 < before < len(steps):
            edges[before] = grow["step"]
    image = axes.pcolormesh(
        edges,
        np.arange(layers * heads + 1),
        tables.reshape(len(steps), -1).T,
        cmap=COLORS,
        norm=_norm(tables),
    )
    for layer in range(1, layers):
        axes.axhline(layer * heads, color="white", linewidth=1.0)
    end = float(_shown(run, int(edges[-1])))
    row = 0.8 * 72 * figure.get_figheight() / (layers * heads)  # points, of a head
    for layer, (step, kept) in run.kept_heads.items():
        for head in kept:
            _outline(axes, step, layer * heads + head, end - step, 1.0, min(1.6, 0.4 * row))
        if row < THIN:
            place = (1.005, (layer + 0.5) * heads)
            axes.text(*place, _listed(kept), transform=axes.get_yaxis_transform(), va="center", fontsize=7)
    if end > edges[-1] + 1:
        axes.axvspan(edges[-1], end, facecolor="#F4F4F4", hatch="///", edgecolor="#D5D5D5", linewidth=0, zorder=0)
        if end - edges[-1] > 0.2 * end:
            axes.text(
                (edges[-1] + end) / 2,
                0.6 * layers * heads,
                "structure fixed:\nno longer measured",
                ha="center",
                va="center",
                fontsize=9,
                color="#555555",
                backgroundcolor="#F4F4F4",
            )
    style.mark_growth(axes, run, labels=True, end=int(end))
    every = max(1, -(-layers // 24))
    axes.set_yticks([(n + 0.5) * heads for n in range(0, layers, every)], [str(n) for n in range(0, layers, every)])
    axes.set_ylabel(f"layer (each band: heads 0 to {heads - 1}, upwards)")
    axes.grid(False)
    _step_axis(axes, run, int(end))
    figure.colorbar(image, ax=axes, label="EMA of attention entropy", pad=0.05 if row < THIN else 0.02)
    return figure


def snapshot_figure(run: RunData) -> Figure | None:
    """The [layer x head] entropies on which each decision was taken, kept heads outlined."""
    steps, tables = run.measured_entropy()
    events = [e for e in run.growth if len(steps) and steps[0] <= e["step"]][:MAX_SNAPSHOTS]
    if not events:
        return None
    shown = [tables[np.searchsorted(steps, e["step"], side="right") - 1] for e in events]
    layers, heads = np.max([table.shape for table in shown], axis=0)
    columns = min(4, len(events))
    rows = -(-len(events) // columns)
    height = rows * min(5.0, max(1.9, 0.9 + 2.1 * layers / max(heads, 4) * 4 / columns * 0.8))
    figure = Figure(figsize=(style.WIDTH, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    norm = _norm(np.concatenate([table.ravel() for table in shown]))
    for panel in panels.flat[len(events) :]:
        panel.set_visible(False)
    for panel, event, table in zip(panels.flat, events, shown, strict=False):
        image = panel.imshow(table, origin="lower", aspect="auto", cmap=COLORS, norm=norm)
        for layer, kept in (event.get("kept_heads") or {}).items():
            for head in kept:
                _outline(panel, head - 0.5, int(layer) - 0.5, 1.0, 1.0)
        panel.set_title(f"step {event['step']:,}: {style.event_label(event)}", fontsize=9)
        panel.set_xlim(-0.5, heads - 0.5)
        panel.set_ylim(-0.5, layers - 0.5)
        panel.grid(False)
        panel.set_xticks(range(0, heads, max(1, heads // 8)))
        panel.set_yticks(range(0, layers, max(1, layers // 12)))
    for panel in panels[-1]:
        panel.set_xlabel("head")
    for row in panels:
        row[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="EMA entropy", pad=0.02)
    return figure


def growth_figure(run: RunData) -> Figure | None:
    """Which layers loop when: the window in which the other heads fade, then the kept heads, and the depth."""
    if not run.growth and not run.grows:
        return None
    depths = [event.get("loop_depth") or [] for event in [*run.growth, *run.grows]]
    layers = max(stage.layers or 1 for stage in run.stages)
    end = _shown(run, max(event["step"] for event in [*run.growth, *run.grows]) + 1)
    deepest = max((max(depth, default=0) for depth in depths), default=1) or 1
    figure, (axes,) = style.new_figure(min(8.0, max(2.6, 1.3 + 0.24 * layers)))
    for stage in run.stages:
        _draw_stage(axes, run, stage, layers, end, deepest)
    for event in run.growth:
        if event.get("action") in ("first_selection", "select_new_layer"):
            _draw_window(axes, run, event, end, 0.30 + 0.5 / deepest)
    for layer, (_, kept) in run.kept_heads.items():
        axes.text(
            1.008,
            layer,
            f"heads {_listed(kept)}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
        )
    style.mark_growth(axes, run, labels=True, end=end)
    style.mark_restarts(axes, run, end)
    every = max(1, -(-layers // 24))
    axes.set_yticks(range(0, layers, every))
    axes.set_ylim(-0.6, layers - 0.4)
    axes.set_ylabel("layer (deep ones above)")
    axes.grid(axis="y", visible=False)
    _step_axis(axes, run, end)
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=style.SKY, edgecolor=style.BLUE, hatch="////"),
        Rectangle((0, 0), 1, 1, facecolor=style.BLUE),
    ]
    names = ["window: all heads loop, the others fade", "kept heads loop"]
    if any((stage.layers or layers) < layers for stage in run.stages):
        handles.append(Rectangle((0, 0), 1, 1, facecolor="#E9E9E9", edgecolor="#C9C9C9", hatch="xx"))
        names.append("layers that are not there yet")
    restarts, restart = axes.get_legend_handles_labels()
    axes.legend(
        [*handles, *restarts],
        [*names, *restart],
        loc="upper left",
        bbox_to_anchor=(0.0, -0.28 / (figure.get_figheight() / 2.6)),
        ncols=3,
    )
    return figure


def _draw_stage(axes: Axes, run: RunData, stage: StageSpan, layers: int, end: int, deepest: int) -> None:
    """The loops of one model in the numbers of its layers, and the layers that it has not got yet."""
    last = min(stage.last, end) if stage is not run.stages[-1] else end
    here = stage.layers or layers
    if here < layers:
        missing = Rectangle((stage.first, here - 0.5), last - stage.first, layers - here + 0.1)
        missing.set(facecolor="#E9E9E9", edgecolor="#C9C9C9", hatch="xx", linewidth=0, zorder=2)
        missing.set_gid(MISSING)
        axes.add_patch(missing)
    events = [event for event in run.growth if stage.holds(event["step"])]
    if stage.grow is not None:
        events = [stage.grow, *events]
        for old, new in enumerate(stage.grow["heirs"]):
            if stage.grow["loop_depth"][new : new + 1] > [0] and old != new:
                axes.plot([stage.first] * 2, [old, new], color=style.BLUE, linewidth=1.4, marker="o", markersize=3)
    for layer in range(here):
        for start, stop, depth in _spans(events, layer, last):
            bar = 0.30 + 0.5 * depth / deepest
            axes.barh(layer, stop - start, left=start, height=bar, color=style.BLUE, edgecolor="white", zorder=2)
            if deepest > 1:
                text = axes.text(
                    start + 0.004 * end, layer, f"x{depth}", va="center", fontsize=8, color="white", zorder=5
                )
                text.set_path_effects([Stroke(linewidth=2.5, foreground=style.BLUE), Normal()])


def _draw_window(axes: Axes, run: RunData, event: Record, end: int, height: float) -> None:
    """The decay window of a selected layer, hatched; in each model under the number that the layer has there."""
    layer = event["layer"]
    until = min(int(event.get("fade_until_step") or event["step"]), end)
    for stage in run.stages:
        start, stop = max(event["step"], stage.first), min(until, stage.last)
        if stage.grow is not None and event["step"] <= stage.first:
            layer = stage.grow["heirs"][layer]
        if stop > start:
            axes.barh(
                layer,
                stop - start,
                left=start,
                height=height,
                facecolor=style.SKY,
                edgecolor=style.BLUE,
                hatch="////",
                linewidth=0.8,
                zorder=3,
            )


def _spans(events: Sequence[Record], layer: int, end: int) -> list[tuple[int, int, int]]:
    changes = [(e["step"], (e.get("loop_depth") or [])[layer : layer + 1]) for e in events]
    stretches: list[tuple[int, int, int]] = []
    since, depth = 0, 0
    for step, found in [*changes, (end, [-1])]:
        now = found[0] if found else depth
        if now != depth:
            if depth > 0:
                stretches.append((since, step, depth))
            since, depth = step, now
    return stretches


def _shown(run: RunData, last: int) -> int:
    """Where the step axis ends: with the run, or soon after step ``last`` where growth takes its first part alone."""
    return int(1.25 * last) if 2 * last < run.last_step else max(run.last_step, last)


def _listed(heads: Sequence[int]) -> str:
    return ", ".join(map(str, heads)) if len(heads) <= NAMED else f"({len(heads)})"


def _step_axis(axes: Axes, run: RunData, end: int) -> None:
    style.step_axis(axes, end)
    if end < run.last_step:
        axes.set_xlabel(f"step (the run goes on to step {run.last_step:,} like this)")


def _edges(steps: Floats) -> Floats:
    """Right edges of the columns: half way to the next report, and as wide again after the last."""
    if len(steps) == 1:
        return steps + 1
    middle = (steps[1:] + steps[:-1]) / 2
    return np.append(middle, steps[-1])


def _norm(tables: Floats) -> Normalize:
    measured = tables[tables > 0]
    low = float(np.quantile(measured, 0.01)) if measured.size else 0.0
    return Normalize(low, max(float(np.nanmax(tables)), low + 1e-6))


def _outline(axes: Axes, x: float, y: float, width: float, height: float, line: float = 1.6) -> None:
    frame = Rectangle((x, y), width, height, fill=False, edgecolor=style.VERMILION, linewidth=line, zorder=4)
    frame.set_gid(FRAME)
    frame.set_path_effects([Stroke(linewidth=1.9 * line, foreground="white"), Normal()])
    axes.add_patch(frame)


def growth_rows(run: RunData) -> list[tuple[str, ...]]:
    """The growth events as rows of a table: step, decision, heads, score, depth, FLOPs."""
    rows: list[tuple[str, ...]] = []
    for event in run.growth:
        layer = event.get("layer")
        kept = (event.get("kept_heads") or {}).get(str(layer), [])
        depth = (event.get("loop_depth") or [])[layer : layer + 1] if layer is not None else []
        overhead = event.get("flops_overhead")
        rows.append(
            (
                f"{event['step']:,}",
                style.event_label(event),
                ", ".join(map(str, kept)),
                units.fixed(event["layer_score"], 3) if event.get("layer_score") is not None else "",
                str(depth[0]) if depth else "",
                "" if overhead is None else f"+{100 * overhead:.2f} %",
            )
        )
    return rows


def stage_rows(run: RunData) -> list[tuple[str, ...]]:
    """The stages after the first as rows of a table: step, operator, sizes, parameters, FLOPs, loss of the probe."""

    def change(grow: Record, name: str, show: Callable[[float], str]) -> str:
        return " -> ".join(
            show(grow[f"{name}_{when}"]) if grow.get(f"{name}_{when}") is not None else "?"
            for when in ("before", "after")
        )

    rows: list[tuple[str, ...]] = []
    for grow in run.grows:
        before, after = grow.get("sizes_before") or {}, grow.get("sizes_after") or {}
        widths = [f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after.get(name)]
        rows.append(
            (
                f"{grow['step']:,}",
                str(grow.get("operator") or ""),
                f"{1 + max(grow['layers'])} -> {len(grow['layers'])}",
                ", ".join(text for text in widths if not text.startswith("num_layers")),
                change(grow, "parameters", lambda value: units.si(value, " ")),
                change(grow, "flops_per_token", lambda value: units.si(value, " ")),
                change(grow, "probe_loss", lambda value: units.fixed(value, 4)),
                units.elapsed(grow["seconds"]) if grow.get("seconds") is not None else "",
            )
        )
    return rows
