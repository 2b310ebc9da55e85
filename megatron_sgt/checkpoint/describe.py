"""Checkpoints described as text, on one screen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from megatron_sgt.checkpoint.contents import Contents, Details, GrowthContents, LoopingLayer, RootContents
from megatron_sgt.checkpoint.layout import PIPELINE_COUNTS, PIPELINE_SIZE
from megatron_sgt.config.base import count
from megatron_sgt.metrics.lines import began
from megatron_sgt.metrics.units import duration, file_size, si

_SHOWN_PROBLEMS = 5


def describe_root(contents: RootContents, now: float | None = None) -> str:
    """All checkpoints of a folder in a table, then the latest in full. ``now``: seconds since 1970."""
    rows = [_row(one, time.time() if now is None else now) for one in contents.checkpoints]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines = [f"{contents.root}: latest is {contents.latest or 'missing'}"]
    if contents.problem is not None:
        lines.append(f"  {contents.problem}")
    lines += [f"  {line}".rstrip() for line in table]
    shown = [one for one in contents.checkpoints if one.is_latest or one.status == "damaged"]
    for one in shown:
        lines += ["", describe(one)]
    return "\n".join(lines)


def describe(contents: Contents) -> str:
    """One checkpoint in full."""
    head = f"{contents.folder}: {contents.status}, {contents.num_files} files, {file_size(contents.num_bytes)}"
    lines = [head]
    hidden = len(contents.problems) - _SHOWN_PROBLEMS
    lines += [f"  ! {problem}" for problem in contents.problems[:_SHOWN_PROBLEMS]]
    if hidden > 0:
        lines.append(f"  ! and {hidden} more")
    if contents.saved_at is not None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(contents.saved_at))
        lines.append(f"  saved     {stamp}{' (layout-free copy)' if contents.copy else ''}")
    if contents.details is not None:
        lines += [f"  {name:<9} {text}" for name, text in _details(contents.details)]
    return "\n".join(lines)


def _row(contents: Contents, now: float) -> tuple[str, ...]:
    details = contents.details
    age = "" if contents.saved_at is None else f"{duration(max(0.0, now - contents.saved_at))} ago"
    notes = ["layout-free copy"] if contents.copy else []
    notes += ["<- latest"] if contents.is_latest else []
    return (
        contents.folder.name,
        age,
        file_size(contents.num_bytes),
        "" if details is None else layout_text(details),
        "" if details is None else loops_text(details.growth),
        " ".join([contents.status, *notes]),
    )


def layout_text(details: Details) -> str:
    """TP2 DP4 Z1 bf16, with a pipeline TP2 PP4 DP4 Z1 bf16 or TP2 PP4xVP2 DP4 Z1 bf16; or "any layout"."""
    where = details.layout
    if where is None:
        return "any layout"
    stages, chunks = where.get(PIPELINE_SIZE, 1), len(where.get(PIPELINE_COUNTS, ()))
    pipeline = f"PP{stages}{f'xVP{chunks // stages}' if chunks > stages else ''} " if stages > 1 else ""
    return (
        f"TP{where.get('tensor_model_parallel_size')} {pipeline}DP{where.get('data_parallel_size')} "
        f"Z{where.get('zero_stage')} {where.get('precision')}"
    )


def value_text(value: Any) -> str:
    """A value of a layout; layers of a pipeline's chunks as the setting has them: 3,2,2,1."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def loops_text(growth: GrowthContents) -> str:
    """19[4,11] 14[2,9]x2: layers in the order of selection, kept heads, depth above 1; "no loops"."""
    return " ".join(_loop(layer) for layer in growth.layers) or "no loops"


def _loop(layer: LoopingLayer) -> str:
    heads = ",".join(map(str, layer.kept_heads)) if layer.kept_heads else "block"
    return f"{layer.layer}[{heads}]" + (f"x{layer.depth}" if layer.depth > 1 else "")


def _details(details: Details) -> Iterator[tuple[str, str]]:
    model = details.model
    skipped = f", {details.skipped_steps:,} skipped" if details.skipped_steps else ""
    yield "step", f"{details.step:,} of {details.train_iters:,}{skipped}"
    one_length = details.tokens == details.samples * model.seq_length
    lengths = f"{model.seq_length:,}" if one_length else "several lengths"
    yield "tokens", f"{details.tokens:,} ({details.samples:,} sequences of {lengths})"
    for number, (name, source) in enumerate(details.sources.items()):
        epochs = "" if source.epochs is None else f", {source.epochs:,.2f} epochs"
        yield "" if number else "data", f"{name}: {source.tokens:,} tokens{epochs}"
    if details.began is not None:
        yield "began", f"with {began(details.began)}"
    yield (
        "model",
        f"{si(details.parameters, ' ')} parameters: {model.num_layers} layers, hidden {model.hidden_size:,}, "
        f"{model.num_attention_heads} heads of {model.kv_channels} in {model.num_query_groups} groups, "
        f"{model.activation} {model.ffn_hidden_size:,}, vocabulary {model.vocab_size:,} "
        f"in {model.padded_vocab_size():,} rows"
        + ("" if model.rotary_scaling is None else f", rotary {model.rotary_scaling.describe()}"),
    )
    if details.layout is None:
        origin = "" if details.origin is None else f", imported from {details.origin}"
        yield (
            "layout",
            f"layout-free: loads at any tensor-parallel, pipeline and data-parallel size, at any ZeRO stage{origin}",
        )
    else:
        yield "layout", ", ".join(f"{name} {value_text(value)}" for name, value in details.layout.items())
    if details.ema_decay is not None:
        yield "ema", f"an average of the weights, decay {details.ema_decay:g}"
    if details.stages:
        yield "stage", f"{len(details.stages)}, since step {details.stages[-1]['step']:,}"
    for number, record in enumerate(details.stages, start=1):
        yield "", f"stage {number}: {_stage(record)}"
    yield "growth", _growth(details.growth)
    for layer in details.growth.layers:
        yield "", _layer(layer)


def _growth(growth: GrowthContents) -> str:
    window = "" if growth.window_end is None else f", its window ends at step {growth.window_end:,}"
    return f"{growth.method}, phase {growth.phase}{window}, {count(len(growth.layers), 'layer')} selected"


def _stage(record: dict[str, Any]) -> str:
    options = ", ".join(f"{name} {value}" for name, value in record["options"].items())
    made_of = "" if record["weights"] == "weights" else ", of the averaged weights"
    return (
        f"{record['operator']}{f' ({options})' if options else ''} after step {record['step']:,}{made_of}; moments "
        f"{record['moments']}, optimizer {record['optimizer']}, learning rate {record['lr_policy']}"
    )


def _layer(layer: LoopingLayer) -> str:
    if not layer.kept_heads:
        return f"layer {layer.layer}: the whole layer {layer.depth} more time{'' if layer.depth == 1 else 's'}"
    text = f"layer {layer.layer}: depth {layer.depth}, kept heads {' '.join(map(str, layer.kept_heads))}"
    if layer.selected_at is not None:
        text += f", selected at step {layer.selected_at:,}"
    return text + (f", other heads at gate {layer.other_gate:.3g}" if layer.other_gate else "")
