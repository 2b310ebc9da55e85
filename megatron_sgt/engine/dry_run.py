"""Validates all that needs no process group, and prints the shape of the run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_sgt.checkpoint.load import check_checkpoint, find_checkpoint
from megatron_sgt.config import Config
from megatron_sgt.data.sources import validate_data
from megatron_sgt.engine.run import with_vocabulary
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.model.flops import overhead, parameter_count, step_flops
from megatron_sgt.parallel.device import resolve_precision, select_device

# Bytes per parameter of a checkpoint: weights, and AdamW's fp32 master copy and two moments.
_WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_OPTIMIZER_BYTES = {"fp32": 8, "bf16": 12, "fp16": 12}


def dry_run(config: Config, world_size: int) -> str:
    """Check configuration, batch arithmetic, tokenizer, data files, disk space and the checkpoint to start from.

    Args:
        world_size: ranks that the run would have.

    Returns:
        A table of the run's shape.

    Raises:
        ConfigError, DataError, CheckpointError: the first thing that would stop the run.
    """
    accumulation = config.num_micro_batches(world_size)
    config = with_vocabulary(config)
    data = validate_data(config)
    folder, start = find_checkpoint(config)
    if folder is not None:
        check_checkpoint(folder, config)
    rows = list(_model_rows(config))
    rows += _batch_rows(config, world_size, accumulation)
    rows.append(
        (
            "data",
            f"{data.documents:,} documents · {data.tokens:,} tokens · {data.train_samples:,} training samples "
            f"· {data.epochs:.2f} epochs · vocabulary {data.vocab_size:,}",
        )
    )
    rows += _disk_rows(config)
    rows.append(("start", start))
    rows += [("note", note) for note in data.notes]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def _model_rows(config: Config) -> Iterator[tuple[str, str]]:
    model, growth = config.model, config.growth
    yield (
        "model",
        f"{parameter_count(model):,} parameters · {model.num_layers} layers · hidden {model.hidden_size} · "
        f"{model.num_attention_heads} heads in {model.num_query_groups} groups · T = {model.seq_length}",
    )
    if growth.method == "vanilla":
        yield "growth", "none (vanilla)"
        return
    plan = final_plan(config)
    added = f"{100 * overhead(model, plan):+.2f} % FLOPs"
    if growth.method == "block_loop":
        yield "growth", f"block loop of layers {list(growth.block_loop_layers)}: {added} from the first step"
        return
    heads = "all heads" if growth.head_choice == "all" else f"{growth.num_keep_heads} heads"
    yield (
        "growth",
        f"up to {growth.max_selected_layers} layers x {heads} x {growth.max_loop_depth} loops from step "
        f"{growth.first_selection_step} on, at most {added} once fixed",
    )


def final_plan(config: Config) -> LoopPlan:
    """The most expensive structure that the configuration can end with (head ids are placeholders)."""
    growth, model = config.growth, config.model
    layers = [n for n in range(model.num_layers) if n not in growth.exclude_layers]
    if growth.method == "block_loop":
        repeated = LayerPlan(block_loops=growth.block_loop_count)
        return LoopPlan(model.num_layers, tuple((n, repeated) for n in growth.block_loop_layers))
    if growth.method == "vanilla":
        return LoopPlan.empty(model.num_layers)
    count = model.num_attention_heads if growth.head_choice == "all" else growth.num_keep_heads
    # Heads of different groups share no keys and values: the costlier case.
    stride = max(1, model.num_attention_heads // count)
    grown = LayerPlan(growth.max_loop_depth, tuple(range(0, stride * count, stride)))
    return LoopPlan(model.num_layers, tuple((n, grown) for n in layers[-growth.max_selected_layers :]))


def _batch_rows(config: Config, world_size: int, accumulation: int) -> list[tuple[str, str]]:
    train, parallel = config.train, config.parallel
    data_parallel = config.data_parallel_size(world_size)
    tokens = train.global_batch_size * config.model.seq_length
    flops = step_flops(config.model, LoopPlan.empty(config.model.num_layers), train.global_batch_size).model
    return [
        (
            "layout",
            f"{world_size} ranks = tensor parallel {parallel.tensor_model_parallel_size} x data parallel "
            f"{data_parallel} · ZeRO-{parallel.zero_stage} · {precision_of(config)}",
        ),
        (
            "batch",
            f"{train.global_batch_size} sequences = micro {train.micro_batch_size} x accumulation "
            f"{accumulation} x data parallel {data_parallel} · {tokens:,} tokens per step",
        ),
        (
            "run",
            f"{train.train_iters:,} steps · {tokens * train.train_iters:,} tokens · "
            f"{flops * train.train_iters:.3g} FLOPs before growth",
        ),
    ]


def precision_of(config: Config) -> str:
    """The precision on this machine, or what is known of it when the run's device is not here."""
    try:
        return resolve_precision(config.train.precision, select_device(config.parallel.device, 0))
    except ConfigError:
        return "bf16" if config.train.precision == "auto" else config.train.precision


def _disk_rows(config: Config) -> Iterator[tuple[str, str]]:
    precision = precision_of(config)
    size = parameter_count(config.model) * (_WEIGHT_BYTES[precision] + _OPTIMIZER_BYTES[precision])
    place = config.save_dir.absolute()
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise CheckpointError(
            f"a checkpoint takes about {size / 1e9:.1f} GB, but {_shown(existing)} has {free / 1e9:.1f} GB free; "
            "make room, or set checkpoint.save"
        )
    keep = config.checkpoint.keep_last
    kept = f"{keep} kept" if keep else "all kept"
    yield (
        "checkpoint",
        f"about {size / 1e9:.2f} GB each, {kept}; {free / 1e9:.0f} GB free at {_shown(existing)}",
    )


def _shown(path: Path) -> str:
    cwd = Path.cwd()
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) and path != cwd else str(path)
