"""What a card says of the run that trained the model: its data, its settings, its loss. No machine's paths.

Everything is read from the checkpoint, but the documents and tokens of old checkpoints' data (PREFIX.json) and the loss
(metrics.jsonl of the run); what cannot be found is not said.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint.forms import LAYOUT_FREE
from megatron_sgt.checkpoint.layout import DATA_STATE, GROWTH_STATE
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE
from megatron_sgt.checkpoint.surgery.state import GROW
from megatron_sgt.config import Config, DataConfig
from megatron_sgt.data.indexed import read_metadata
from megatron_sgt.data.prefix import resolve_prefix
from megatron_sgt.errors import DataError
from megatron_sgt.evaluation.perplexity import perplexity
from megatron_sgt.export.source import ExportSource
from megatron_sgt.jsonl import read_all, without_void_records
from megatron_sgt.metrics import METRICS_FILE
from megatron_sgt.planning.phases import phase_lines

Row = tuple[str, str]
PIPE = "\\|"
"""How a table has this sign in a cell, in code too."""


def data_section(source: ExportSource) -> list[str]:
    """What the model was trained on: every file of the blend with its share of the samples."""
    orders = source.state.get(DATA_STATE) or []
    files = orders[-1]["files"] if orders else list(_files_of(source.config))
    if not files:
        return []
    total = sum(file["weight"] for file in files)
    rows = [
        f"| {_code(_name(file['prefix'])).replace('|', PIPE)} | {file['weight'] / total:.4g} | "
        f"{_count(file.get('documents'))} | {_count(file.get('tokens'))} |"
        for file in files
    ]
    lines = [
        "## Data",
        "",
        "| data set | share of the samples | documents | tokens |",
        "| --- | --- | --- | --- |",
        *rows,
    ]
    if held := _held_out(source.config):
        lines += ["", held]
    before = [*dict.fromkeys(_name(file["prefix"]) for order in orders[:-1] for file in order["files"])]
    if before and orders[-1]["from_sample"]:
        names = ", ".join(map(_code, before))
        lines += ["", f"From sample {orders[-1]['from_sample']:,} on; before, the run read {names}."]
    return [*lines, ""]


def _files_of(config: Config) -> Iterator[dict[str, Any]]:
    """The files that the configuration names, with what is written beside them."""
    for weight, prefix in config.data.blend() if config.data.data_path else ():
        try:
            beside = read_metadata(resolve_prefix(prefix)[0])
        except DataError:
            beside = {}
        yield {"weight": weight, "prefix": prefix, **{k: beside.get(k) for k in ("documents", "tokens")}}


def _count(number: int | None) -> str:
    return "not recorded" if number is None else f"{number:,}"


def _held_out(config: Config) -> str:
    _, valid, test = config.data.split_shares()
    parts = [f"{share:.3g} for {name}" for share, name in ((valid, "validation"), (test, "test")) if share]
    return f"Of the documents of each, shares were held out: {' and '.join(parts)}." if parts else ""


def training_section(source: ExportSource) -> list[str]:
    """The settings of the run that determine its result on any hardware."""
    rows = [f"| {name} | {value} |" for name, value in _settings(source)]
    return ["## Training", "", "| | |", "| --- | --- |", *rows, ""]


def _settings(source: ExportSource) -> Iterator[Row]:
    config = source.config
    model, optim, train = config.model, config.optim, config.train
    adam = f" (beta {optim.adam_beta1:g} and {optim.adam_beta2:g}, epsilon {optim.adam_eps:g})"
    yield "optimizer", optim.optimizer + (adam if optim.optimizer == "adamw" else "")
    decayed = "every parameter" if optim.weight_decay_on == "all" else "matrices only"
    yield "weight decay", f"{optim.weight_decay:g}, {decayed}" if optim.weight_decay else "none"
    yield "gradient clipping", f"norm {optim.clip_grad:g}" if optim.clip_grad else "none"
    yield "learning rate", _learning_rate(config)
    if config.phases:
        yield from (("phase", line) for line in phase_lines(config))
    else:
        yield (
            "batch",
            f"{train.global_batch_size:,} sequences, {train.global_batch_size * model.seq_length:,} tokens per step",
        )
    shorter = ", shorter at first (data.seq_length_curriculum)" if config.data.seq_length_curriculum else ""
    yield "sequence length", f"{model.seq_length:,}{shorter}"
    if documents := ", ".join(_documents(config.data)):
        yield "documents of a sequence", documents
    yield "precision", _precision(source)
    if model.attention_dropout or model.hidden_dropout:
        yield "dropout", f"attention {model.attention_dropout:g}, hidden {model.hidden_dropout:g}"
    yield "seed", str(train.seed)
    yield "growth", _growth(source)


def _documents(data: DataConfig) -> Iterator[str]:
    if data.packing == "best_fit":
        yield "packed whole (data.packing best_fit)"
    if data.reset_attention_mask:
        yield "attention does not cross them"
    if data.reset_position_ids:
        yield "positions begin anew with each"
    if data.eod_mask_loss:
        yield "none predicts the next one"


def _learning_rate(config: Config) -> str:
    optim = config.optim
    text = f"{optim.lr:g}, {optim.lr_decay_style} to {optim.min_lr:g}"
    if optim.lr_decay_style == "constant":
        text = f"{optim.lr:g}, constant"
    elif optim.lr_wsd_decay_iters is not None:
        text += f" over the last {optim.lr_wsd_decay_iters:,} steps"
    elif optim.lr_decay_style != "WSD":
        text += f" at step {optim.lr_decay_iters or config.train.train_iters:,}"
    return text + (f", {optim.lr_warmup_iters:,} steps of warm-up" if optim.lr_warmup_iters else "")


def _precision(source: ExportSource) -> str:
    """Of the run that saved the checkpoint: its layout names what "auto" was."""
    where = source.state["layout"] or (source.state.get(LAYOUT_FREE) or {}).get("source_layout") or {}
    return str(where.get("precision", source.config.train.precision))


def _growth(source: ExportSource) -> str:
    growth = source.config.growth
    selected = any(layer.selected_at is not None for layer in source.details.growth.layers)
    if growth.options is not None or not selected:  # a method with settings of its own, or none were used
        return f"`{growth.method}`"
    return (
        f"`{growth.method}`: from step {growth.first_selection_step:,} on, windows of {growth.window_size:,} steps, "
        f"at most {growth.max_selected_layers} layers of depth {growth.max_loop_depth}, {growth.num_keep_heads} heads "
        f"kept ({growth.head_choice} entropy), decay {growth.decay_type}"
    )


def validation_section(source: ExportSource) -> list[str]:
    """The run's last validation up to the checkpoint's step."""
    loss, step = _last_validation(source)
    if loss is None:
        return []
    where = "" if step == source.details.step else f" (the checkpoint is of step {source.details.step:,})"
    which = "the averaged weights" if source.quantity == AVERAGE else "the weights"
    return [
        "## Evaluation",
        "",
        f"Validation loss of {which} after step {step:,}{where}: **{loss:.4f}** nats per token, perplexity "
        f"{perplexity(loss):,.4g}, as the run measured it. `tools/evaluate.py` adds bits per byte.",
        "",
    ]


def _last_validation(source: ExportSource) -> tuple[float | None, int]:
    field = "ema_loss" if source.quantity == AVERAGE else "loss"
    try:
        records = without_void_records(read_all(_metrics_of(source), []))
    except DataError:
        return None, 0
    found = [
        (record[field], record["step"])
        for record in records
        if record["kind"] == "valid" and field in record and record["step"] <= source.details.step
    ]
    return found[-1] if found else (None, 0)


def _metrics_of(source: ExportSource) -> Path:
    """Beside the folder of checkpoints, wherever the run lies by now; else where it was written."""
    beside = source.folder.resolve().parent.parent / METRICS_FILE
    return beside if beside.is_file() else Path(source.config.logging.run_dir) / METRICS_FILE


def size_section(source: ExportSource) -> list[str]:
    """How the model became deeper or wider, step by step."""
    saved = source.state["hooks"].get(GROWTH_STATE) or {}
    events = [event for event in saved.get("events", ()) if event.get("action") == GROW]
    if not events:
        return []
    rows = [f"| {event['step']:,} | `{event['operator']}` | {_became(event)} |" for event in events]
    return ["## Growth of the model", "", "| after step | by | what changed |", "| --- | --- | --- |", *rows, ""]


def _became(event: dict[str, Any]) -> str:
    before, after = event.get("sizes_before", {}), event.get("sizes_after", {})
    changes = [f"{name} {before[name]} -> {after[name]}" for name in after if before.get(name) != after[name]]
    return ", ".join(changes) or "not recorded"


def _name(prefix: str) -> str:
    return " ".join(Path(prefix).name.split())


def _code(text: str) -> str:
    """``text`` as it stands, whatever signs of Markdown it has."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"
