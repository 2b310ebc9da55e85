"""Pictures of one run over its steps: loss, cost, speed. Each returns None if there is nothing to show."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_sgt.metrics import units
from megatron_sgt.reporting import style
from megatron_sgt.reporting.run_data import Floats, RunData


def loss_figure(run: RunData) -> Figure | None:
    """Training and validation loss, growth marked; losses that are not finite are marked on the upper edge."""
    steps, losses = run.series("train", "loss")
    valid_steps, valid = run.series("valid", "loss")
    ema_steps, ema = run.series("valid", "ema_loss")
    if not len(steps) and not len(valid_steps):
        return None
    figure, (axes,) = style.new_figure(4.0)
    style.mark_growth(axes, run, labels=True)
    finite = np.isfinite(losses)
    axes.plot(steps[finite], losses[finite], color=style.BLUE, linewidth=1.5, label="training loss")
    if len(valid_steps):
        axes.plot(
            valid_steps,
            valid,
            color=style.VERMILION,
            marker="o",
            markersize=5,
            linewidth=1.2,
            label="validation loss",
        )
    if len(ema_steps):
        look: dict[str, Any] = {"color": style.GREEN, "marker": "s", "markersize": 4, "linewidth": 1.2}
        axes.plot(ema_steps, ema, label="validation loss, averaged weights", **look)
    if not finite.all():
        axes.plot(
            steps[~finite],
            np.ones((~finite).sum()),
            "x",
            color=style.VERMILION,
            markersize=8,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            label="loss not finite",
        )
    _trim_start(axes, losses[finite])
    style.mark_restarts(axes, run)
    axes.set_ylabel("loss (nats per token)")
    style.step_axis(axes, run.last_step)
    axes.legend(loc="upper right")
    return figure


def _trim_start(axes: Axes, losses: Floats) -> None:
    if len(losses) >= 50:
        top = float(np.quantile(losses, 0.98))
        low = float(losses.min())
        axes.set_ylim(low - 0.05 * (top - low), top + 0.05 * (top - low))


def cost_figure(run: RunData) -> Figure | None:
    """What loops cost: FLOPs per token by the closed form, measured time per step, both over vanilla's steps."""
    steps, flops = run.flops_per_token()
    time_steps, seconds = run.series("train", "step_time_s")
    if not len(steps):
        return None
    figure, (above, below) = style.new_figure(4.6, rows=2)
    style.mark_growth(above, run, labels=True)
    style.mark_growth(below, run)
    above.step(steps, flops, where="pre", color=style.BLUE, linewidth=1.6)
    style.si_axis(above)
    above.set_ylabel("model FLOPs per token")
    _percent_axis(above, float(flops[0]))
    below.plot(time_steps, seconds, ".", color=style.GREY, markersize=3, label="as logged")
    smooth = _running_median(seconds, 9)
    below.plot(time_steps, smooth, color=style.VERMILION, linewidth=1.6, label="running median of 9")
    top = float(np.nanquantile(seconds, 0.98)) * 1.15
    below.set_ylim(0, top if np.isfinite(top) and top > 0 else 1.0)
    below.set_ylabel("seconds per step")
    below.legend(loc="lower right", ncols=2)
    style.step_axis(below, run.last_step)
    above.set_xlabel("")
    return figure


def _percent_axis(axes: Axes, base: float) -> None:
    if base > 0:

        def percent(value: Any) -> Any:
            return 100 * (value / base - 1)

        def absolute(value: Any) -> Any:
            return base * (1 + value / 100)

        other = axes.secondary_yaxis("right", functions=(percent, absolute))
        other.set_ylabel("% over the first step")


def _running_median(values: Floats, width: int) -> Floats:
    half = width // 2
    return np.array([np.median(values[max(0, n - half) : n + half + 1]) for n in range(len(values))])


_SPEED = (
    ("tokens_per_second", "tokens per second", 1.0),
    ("mfu", "MFU (%)", 100.0),
    ("memory_gb", "memory of rank 0 (GB)", 1.0),
)


def speed_figure(run: RunData) -> Figure | None:
    """Throughput, and where they were measured MFU and memory."""
    found = [(run.series("train", key), label, scale) for key, label, scale in _SPEED]
    found = [row for row in found if len(row[0][0])]
    if not found:
        return None
    figure, axes = style.new_figure(1.0 + 1.5 * len(found), rows=len(found))
    for ax, ((steps, values), label, scale) in zip(axes, found, strict=True):
        style.mark_growth(ax, run, labels=ax is axes[0])
        ax.plot(steps, values * scale, color=style.BLUE, linewidth=1.4)
        ax.set_ylim(bottom=0)
        ax.set_ylabel(label)
        if label.startswith("tokens"):
            style.si_axis(ax)
    style.mark_restarts(axes[-1], run)
    style.step_axis(axes[-1], run.last_step)
    return figure


def headline(run: RunData) -> list[tuple[str, str]]:
    """(name, value) of the most important numbers; unknown ones are omitted."""
    found: list[tuple[str, str]] = []
    train = run.of_kind("train")
    if train:
        last = train[-1]
        total = last.get("train_iters")
        found.append(("step", f"{last['step']:,}" + (f" of {total:,}" if total else "")))
        if last.get("loss") is not None:
            found.append(("training loss", units.fixed(last["loss"], 3)))
        if last.get("consumed_tokens"):
            found.append(("tokens", units.si(last["consumed_tokens"], " ")))
    valid = run.of_kind("valid")
    if valid:
        if valid[-1].get("loss") is not None:
            found.append(("validation loss", units.fixed(valid[-1]["loss"], 3)))
        if valid[-1].get("perplexity") is not None:
            found.append(("perplexity", units.perplexity(valid[-1]["perplexity"])))
        if valid[-1].get("bits_per_byte") is not None:
            found.append(("bits per byte", units.fixed(valid[-1]["bits_per_byte"], 3)))
        if valid[-1].get("ema_loss") is not None:
            found.append(("validation loss, averaged weights", units.fixed(valid[-1]["ema_loss"], 3)))
        sets = valid[-1].get("sets") or {}
        found += [(f"validation loss, {name}", units.fixed(one.get("loss"), 3)) for name, one in sets.items()]
    _, flops = run.cumulative("model_flops_per_step")
    if len(flops):
        found.append(("model FLOPs", units.si(float(flops[-1]), " ")))
    overheads = [e["flops_overhead"] for e in run.growth if e.get("flops_overhead") is not None]
    if overheads:
        found.append(("loops add", f"{100 * overheads[-1]:.2f} % FLOPs"))
    if run.kept_heads:
        found.append(("looping layers", ", ".join(str(n) for n in sorted(run.kept_heads, reverse=True))))
    if run.grows:
        found.append(("stages", " -> ".join(str(stage.layers) for stage in run.stages) + " layers"))
    if run.restarts:
        found.append(("restarts", str(len(run.restarts))))
    return found
