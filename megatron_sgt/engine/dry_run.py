"""Validates all that needs no process group, and prints the shape of the run."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_sgt.checkpoint.size import check_disk, checkpoint_bytes
from megatron_sgt.config import Config
from megatron_sgt.data.sources import validate_data
from megatron_sgt.engine.preflight import (
    Start,
    check_deepspeed,
    check_surroundings,
    find_start,
    with_vocabulary,
)
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth import LoopPlan
from megatron_sgt.metrics.units import file_size
from megatron_sgt.parallel.device import select_device
from megatron_sgt.planning.flops import overhead, step_flops
from megatron_sgt.planning.loop_cost import choose_loop_method
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.planning.structure import final_plan


def dry_run(config: Config, world_size: int, assumed: bool = False) -> str:
    """Check configuration, batch arithmetic, tokenizer, data files, disk space and the checkpoint to start from.

    Args:
        world_size: ranks that the run would have.
        assumed: nobody said so; a note tells the reader.

    Returns:
        A table of the run's shape.

    Raises:
        ConfigError, DataError, CheckpointError: the first thing that would stop the run.
    """
    accumulation = config.num_micro_batches(world_size)
    check_surroundings(config)
    check_deepspeed(config, world_size, precision_of(config))
    config = with_vocabulary(config)
    data = validate_data(config)
    start = find_start(config)
    rows = list(_model_rows(config))
    rows += _batch_rows(config, world_size, accumulation)
    rows.append(
        (
            "data",
            f"{data.documents:,} documents · {data.tokens:,} tokens · {data.train_samples:,} training samples "
            f"· {data.epochs:.2f} epochs · vocabulary {data.vocab_size:,}",
        )
    )
    rows.append(_disk_row(config))
    rows.append(("start", start.sentence))
    notes = [*data.notes, *_start_notes(config, start)]
    if assumed:
        notes.append(f"planned for {_count(world_size, 'rank')}; --world-size N plans for another number")
    rows += [("note", note) for note in notes]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _start_notes(config: Config, start: Start) -> Iterator[str]:
    if start.folder is None:
        return
    yield from start.skipped
    step, wanted = start.saved["trainer"]["step"], config.train.train_iters
    if step >= wanted:
        yield f"nothing to do: the checkpoint is at step {step:,} of {wanted:,}; raise train.train_iters to go on"
    if start.changed:
        yield f"changed since the checkpoint was saved: {'; '.join(start.changed)}"


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
    if growth.replay is not None:
        count = _count(sum(layer.loops > 0 for layer in plan), "layer")
        yield "growth", f"repeats the decisions of {growth.replay}: {count}, {added} once fixed"
        return
    loops = _count(growth.max_loop_depth, "loop")
    heads = "all heads" if growth.head_choice == "all" else _count(growth.num_keep_heads, "head")
    yield (
        "growth",
        f"up to {_count(growth.max_selected_layers, 'layer')} x {heads} x {loops} from step "
        f"{growth.first_selection_step} on, at most {added} once fixed",
    )


def _loop_rows(config: Config) -> list[tuple[str, str]]:
    if config.parallel.tensor_model_parallel_size == 1 or config.growth.method != "sgt":
        return []
    return [("loops", choose_loop_method(config)[1])]


def _batch_rows(config: Config, world_size: int, accumulation: int) -> list[tuple[str, str]]:
    train, parallel = config.train, config.parallel
    data_parallel = config.data_parallel_size(world_size)
    tokens = train.global_batch_size * config.model.seq_length
    flops = step_flops(config.model, LoopPlan.empty(config.model.num_layers), train.global_batch_size).model
    return [
        (
            "layout",
            f"{_count(world_size, 'rank')} = tensor parallel {parallel.tensor_model_parallel_size} x data parallel "
            f"{data_parallel} · ZeRO-{parallel.zero_stage} · {_shown_precision(config)}",
        ),
        *_loop_rows(config),
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
        device = select_device(config.parallel.device, 0)
    except ConfigError:
        return "bf16" if config.train.precision == "auto" else config.train.precision
    return config.precision_on(device.type)


def _shown_precision(config: Config) -> str:
    precision = precision_of(config)
    undecided = config.train.precision == "auto" and config.parallel.device == "auto" and precision == "fp32"
    return f"{precision} (on GPUs bf16)" if undecided else precision


def _disk_row(config: Config) -> tuple[str, str]:
    precision, keep = precision_of(config), config.checkpoint.keep_last
    _, free = check_disk(config, precision)
    size = file_size(checkpoint_bytes(config, precision))
    kept = f"{keep} kept" if keep else "all kept"
    return "checkpoint", f"about {size} each, {kept}; {file_size(free)} free for {config.save_dir}"
