"""A plan as text of at most WIDTH columns. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from megatron_sgt.config import Config
from megatron_sgt.metrics.units import duration, file_size, si
from megatron_sgt.planning.describe import growth_line, model_line, pipeline_lines, stages_line
from megatron_sgt.planning.kept import kept_text
from megatron_sgt.planning.layout import batch_line, layout_line
from megatron_sgt.planning.step_time import NOT_CALIBRATED
from megatron_sgt.stages.stages import stages_of

WIDTH = 100
_LABEL = 12
_MOMENTS = {"now": "now", "window": "in a window", "final": "after growth"}
_MEMORY_ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "average": "average of the weights",
    "buffers": "buffers (buckets, gathering)",
    "borrowed": "borrowed weight and its gradient",
    "layers": "activations of layers",
    "loops": "activations of loops",
    "logits": "logits and loss",
    "kept": "kept weights of loops",
    "transient": "more in the backward pass",
}
_PARTS = {"entropy": "entropy, until the last decision"}
_BAR = 40


def render(plan: dict[str, Any], config: Config, title: str) -> str:
    """``plan`` (see ``make_plan``) as text."""
    lines = [title]
    for part in (_shape, _stages, _phases, _memory, _other_layouts, _compute, _traffic, _time, _ending):
        found = list(part(plan, config))
        lines += ["", *found] if found and part is not _shape else found
    return "\n".join(lines)


def _row(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{label:<{_LABEL}}",
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _shape(plan: dict[str, Any], config: Config) -> Iterator[str]:
    layout, world = plan["layout"], plan["layout"]["world_size"]
    stages = stages_of(config)
    if len(stages) > 1:
        yield from _row("stages", stages_line(stages))
        config = stages[-1].config
    parts = [f"{name} {_billions(number)}" for name, number in plan["parameters"].items() if name != "total"]
    yield from _row("model" if len(stages) == 1 else "last model", model_line(config))
    yield from _row("", " · ".join(parts))
    yield from _row("growth", growth_line(config))
    if (lengths := config.seq_lengths.text()) and not config.phases:
        yield from _row("lengths", lengths)
    more = f" · sequence parallel {'on' if config.parallel.sequence_parallel else 'off'}"
    more += f" · recompute {config.train.recompute_granularity}"
    yield from _row("layout", layout_line(config, world, layout["precision"]) + more)
    for number, line in enumerate(pipeline_lines(stages, world)):
        yield from _row("" if number else "pipeline", line)
    yield from _row("batch", batch_line(config, world))
    if "documents" in plan:
        yield from _row("documents", _documents(plan["documents"]))


def _documents(documents: dict[str, Any]) -> str:
    if not documents["measured"]:
        return "no token attends to another document; FLOPs and times assume one per sequence: --data measures the data"
    lengths = documents["share"]
    shares = [
        f"{100 * share:.3g} %" + (f" at T {int(length):,}" if len(lengths) > 1 else "")
        for length, share in lengths.items()
    ]
    padding = f" · {100 * documents['padding']:.2g} % of the tokens are padding" if documents["padding"] else ""
    return f"attention has {', '.join(shares)} of the work of whole sequences (measured){padding}"


def _phases(plan: dict[str, Any], config: Config) -> Iterator[str]:
    if "phases" not in plan:
        return
    yield f"{'phases':<22}{'steps':>26}{'tokens':>12}{'FLOPs':>13}{'time':>14}"
    for row in plan["phases"]:
        name = row["name"] if len(row["name"]) <= 24 else f"{row['name'][:21]}..."
        yield (
            f"  {name}{_steps(row):>{46 - len(name)}}{_billions(row['tokens']):>12}{row['flops']:>13.3g}"
            f"{_span(86400 * row['days']):>14}"
        )
        yield from _row("", " · ".join(row["settings"]))


def _stages(plan: dict[str, Any], config: Config) -> Iterator[str]:
    if "stages" not in plan:
        return
    table, run = plan["stages"], plan["run"]
    yield (
        f"{'stages':<19}{'steps':>24}{'tokens':>9}{'layers':>8}{'hidden':>8}{'ffn':>8}{'heads':>7}{'parameters':>12}"
    )
    for row in table["rows"]:
        yield (
            f"{_name(row):<19}{_steps(row):>24}{_billions(row['tokens']):>9}{row['num_layers']:>8}"
            f"{row['hidden_size']:>8}{row['ffn_hidden_size']:>8}{row['num_attention_heads']:>7}"
            f"{_billions(row['parameters']):>12}"
        )
    yield f"{'':<19}{'FLOPs per token':>18}{'FLOPs':>11}{'peak per rank':>16}{'checkpoint':>13}{'time':>13}"
    for row in table["rows"]:
        yield (
            f"{_name(row):<19}{si(row['flops_per_token'], ' '):>18}{row['flops']:>11.3g}{file_size(row['peak']):>16}"
            f"{file_size(row['checkpoint_bytes']):>13}{_span(86400 * row['days']):>13}"
        )
    yield (
        f"{'  the whole run':<19}{si(run['flops'] / run['tokens'], ' '):>18}{run['flops']:>11.3g}"
        f"{file_size(table['peak']):>16}{file_size(table['on_disk']):>13}{_span(86400 * run['days']):>13}"
    )
    yield from _row(
        "saving",
        f"{table['scratch_flops']:.3g} FLOPs train the last model from the first step on as many tokens: "
        f"{100 * table['saving']:+.1f} % over this run",
    )
    for row in table["rows"][1:]:
        seconds = row["boundary_s"]
        parts = f"save {seconds['save']:.3g}, rebuild {seconds['rebuild']:.3g}, read {seconds['read']:.3g}"
        text = f"{NOT_CALIBRATED}: {seconds['total']:.3g} s after step {row['first_step'] - 1:,} ({parts})"
        yield from _row("boundary", text)
        if "growth_time" in row:
            yield from _row("growth time", _growth_time(row["growth_time"]))


def _growth_time(fit: dict[str, Any]) -> str:
    """What G_stack's source fits, beside what the run does."""
    text = f"after {_billions(fit['configured'])} tokens; fitted growth time {_billions(fit['fitted'])} tokens"
    notes = [f"clamped to {_billions(fit['tokens'])}, a tenth of the run"] if fit["clamped"] else []
    notes += [] if fit["in_range"] else ["outside the models and runs that the fit was made of"]
    return text + (f" ({'; '.join(notes)})" if notes else "") + ", arXiv 2405.15319"


def _name(row: dict[str, Any]) -> str:
    return f"  {row['stage']}" + (f" {row['operator']}" if row["operator"] else "")


def _steps(row: dict[str, Any]) -> str:
    return f"{row['first_step']:,} .. {row['last_step']:,}"


def _memory(plan: dict[str, Any], config: Config) -> Iterator[str]:
    memory = plan["memory"]
    moments = [name for name in _MOMENTS if name in memory]
    head = f"memory, pipeline stage {memory['pipeline_stage']}" if "pipeline_stage" in memory else "memory per rank"
    head += f", stage {memory['stage']}" if "stage" in memory else ""
    yield f"{head:<34}" + "".join(f"{_MOMENTS[name]:>16}" for name in moments)
    for key, label in _MEMORY_ROWS.items():
        values = [memory[name][key] for name in moments]
        if any(values):
            yield f"  {label:<32}" + "".join(f"{file_size(value):>16}" for value in values)
    yield f"  {'total':<32}" + "".join(f"{file_size(memory[name]['total']):>16}" for name in moments)
    worst, limit = max(memory[name]["total"] for name in moments), memory["limit"]
    filled = min(_BAR, round(_BAR * worst / limit))
    verdict = "fits" if worst <= limit else "DOES NOT FIT"
    yield (
        f"  [{'#' * filled}{'-' * (_BAR - filled)}] {100 * worst / limit:.0f} % of the usable "
        f"{file_size(limit)}: {verdict}"
    )
    if "pipeline_stages" in memory:
        each = (f"{file_size(row['peak'])} ({row['in_flight']})" for row in memory["pipeline_stages"])
        yield from _row("  peaks", f"by pipeline stage (in flight): {', '.join(each)}")


def _other_layouts(plan: dict[str, Any], config: Config) -> Iterator[str]:
    limit, parallel, train = plan["memory"]["limit"], config.parallel, config.train
    names = [name for name in plan["peak_by_layout"][0] if name != "zero_stage"]
    yield f"{'peak by ZeRO stage, recompute:':<34}" + "".join(f"{name:>16}" for name in names)
    for row in plan["peak_by_layout"]:
        cells = []
        for name in names:
            size = row[name]
            here = (row["zero_stage"], name) == (parallel.zero_stage, train.recompute_granularity)
            text = "-" if size is None else file_size(size) + (" *" if here else "  " if size <= limit else " !")
            cells.append(f"{text:>16}")
        yield (f"  ZeRO {row['zero_stage']:<27}" + "".join(cells)).rstrip()
    yield "  * this run   ! does not fit   - refused"


def _compute(plan: dict[str, Any], config: Config) -> Iterator[str]:
    run = plan["run"]
    yield f"{'compute':<22}{'steps':>26}{'loops':>8}{'FLOPs per token':>18}{'overhead':>11}{'FLOPs':>13}"
    for entry in plan["compute"]:
        phase = entry["phase"] + (f", stage {entry['stage']}" if "stage" in entry else "")
        phase += f", T {entry['seq_length']:,}" if config.seq_lengths.ends else ""
        yield (
            f"  {phase}{_steps(entry):>{46 - len(phase)}}{entry['loops']:>8}{si(entry['flops_per_token'], ' '):>18}"
            f"{100 * entry['overhead']:>+9.2f} %{entry['flops']:>13.3g}"
        )
    whole = sum(entry["flops"] for entry in plan["compute"])
    base = sum(entry["flops"] / (1 + entry["overhead"]) for entry in plan["compute"])
    yield (
        f"  {'the whole run':<20}{run['steps']:>26,}{'':>8}{si(whole / run['tokens'], ' '):>18}"
        f"{100 * (whole / base - 1):>+9.2f} %{whole:>13.3g}"
    )


def _traffic(plan: dict[str, Any], config: Config) -> Iterator[str]:
    rows = plan["traffic"]["per_step"]
    if not rows:
        yield from _row("traffic", "none: one rank")
        return
    yield f"{'sent per rank and step, grown':<34}{'group':>10}{'collective':>17}{'calls':>12}{'bytes':>14}"
    for item in rows:
        kind = item["kind"].replace("_", "-")
        yield (
            f"  {_PARTS.get(item['part'], item['part']):<32}{item['group']:>10}{kind:>17}{item['calls']:>12,}"
            f"{file_size(item['wire_bytes']):>14}"
        )
    passes = plan["traffic"].get("loop_pass")
    if passes:
        loops = f"{file_size(passes['owner'])} at the owner"
        if "balanced" in passes:
            loops = f"{file_size(passes['owner'])} naive (at the owner), {file_size(passes['balanced'])} balanced"
        yield f"  per micro-batch: a layer {file_size(plan['traffic']['layer'])}; a loop pass {loops}"


def _time(plan: dict[str, Any], config: Config) -> Iterator[str]:
    run, layout, times = plan["run"], plan["layout"], plan["step_time"]
    vanilla, length = times["vanilla"], f" at T {config.model.seq_length:,}" if config.seq_lengths.ends else ""
    yield from _row(
        "time",
        f"{_span(86400 * run['days'])} for {_billions(run['tokens'])} tokens at {100 * run['mfu']:.3g} % MFU (assumed; "
        f"--mfu) on {layout['world_size']} x {layout['gpu']}",
    )
    ends = f", between stages {vanilla['pipeline']:.3g}, bubble {vanilla['bubble']:.3g}" if "pipeline" in plan else ""
    model = (
        f"{times['note']}: {vanilla['total']:.3g} s per step{length} (products {vanilla['compute']:.3g}, between them "
        f"{vanilla['elementwise']:.3g}, tensor parallel {vanilla['tensor_parallel']:.3g}, data parallel "
        f"{vanilla['data_parallel']:.3g}{ends})"
    )
    names = {"owner": "naive" if "balanced" in times else "", "balanced": "balanced"}
    loops = [
        f"{1e3 * times[way]['loops']:.3g} ms ({100 * times[way]['loops'] / vanilla['total']:+.2g} %) {name}".rstrip()
        for way, name in names.items()
        if way in times
    ]
    yield from _row("step model", model + (f"; grown loops add {', '.join(loops)}" if loops else ""))


def _billions(number: float) -> str:
    """Counts of parameters and tokens: 6.74 B."""
    return si(number, " ").replace(" G", " B")


def _span(seconds: float) -> str:
    days = seconds / 86400
    return f"{days:,.1f} days" if days >= 10 else duration(seconds)


def _ending(plan: dict[str, Any], config: Config) -> Iterator[str]:
    saved = plan["checkpoint"]
    on_disk, each, ends = saved["bytes"] * saved["at_the_end"], "each", 0
    if "stages" in plan:
        table, each = plan["stages"], "the largest"
        on_disk, ends = table["on_disk"], len(table["boundary_saves"])
    kept = kept_text(config, ends)
    yield from _row(
        "checkpoint",
        f"{file_size(saved['bytes'])} {each} · {saved['saves']:,} saves, {kept}: {file_size(on_disk)} on disk",
    )
    for number, text in enumerate(plan["warnings"], start=1):
        yield from _row("warnings" if number == 1 else "", f"{number}  {text}")
    if not plan["warnings"]:
        yield from _row("warnings", "none")
    for number, text in enumerate(plan["error_bars"]):
        yield from _row("" if number else "error bars", text)
