"""Validates all that needs no process group, and prints the shape of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_sgt.arch.attended_pairs import AttendedPairs
from megatron_sgt.config import Config
from megatron_sgt.config.base import count
from megatron_sgt.data.export_form import export_form
from megatron_sgt.data.measured_pairs import measured_pairs
from megatron_sgt.data.sources import validate_data
from megatron_sgt.data.tokenizer import tokenizer_of
from megatron_sgt.engine.data_start import data_start
from megatron_sgt.engine.deepspeed_config import check_deepspeed
from megatron_sgt.engine.hooks.base import own_hooks
from megatron_sgt.engine.live_tasks import open_tasks
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth import LoopPlan
from megatron_sgt.lease import holder_of, inside
from megatron_sgt.optim.schedule import check_curve
from megatron_sgt.parallel.device import device_type
from megatron_sgt.planning.describe import growth_line, model_line, pipeline_lines, stages_line
from megatron_sgt.planning.flops import flops_between
from megatron_sgt.planning.layout import batch_line, layout_line
from megatron_sgt.planning.loop_cost import choose_loop_method
from megatron_sgt.planning.phases import phase_lines
from megatron_sgt.planning.structure import most_kept_heads
from megatron_sgt.preflight import Start, check_disk, check_export, check_surroundings, find_start, with_vocabulary
from megatron_sgt.stages.stages import Stage, stages_of


def dry_run(config: Config, world_size: int, assumed: bool = False) -> str:
    """Check configuration, batch arithmetic, tokenizer, data files, disk space and the checkpoint to start from.

    Args:
        world_size: ranks that the run would have.
        assumed: the number is a guess; a note says so.

    Returns:
        A table of the run's shape.

    Raises:
        ConfigError, DataError, CheckpointError: the first thing that would stop the run.
    """
    config.num_micro_batches(world_size)
    check_surroundings(config)
    own_hooks(config)
    precision = precision_of(config)
    check_deepspeed(config, world_size, precision)
    config = with_vocabulary(config)
    stages = stages_of(config)
    check_curve(stages)
    data, start, disk = validate_data(config), find_start(config), check_disk(config, precision)
    if config.evaluation.tasks:
        open_tasks(config, tokenizer_of(config.data))
    several = [("stages", stages_line(stages))] if len(stages) > 1 else []
    rows = [("model", model_line(config)), *several, ("growth", growth_line(stages[-1].config))]
    rows += _batch_rows(stages, world_size, measured_pairs(config))
    change = data_start(config, start, keep_indices=False).change
    rows += [("data", data.line()), ("checkpoint", disk), ("start", start.sentence(config))]
    notes = [*data.notes, *_start_notes(config, start), *([] if change is None else [change.line()])]
    if assumed:
        notes.append(f"planned for {count(world_size, 'rank')}; --world-size N plans for another number")
    exported = export_form(config.data.tokenizer)
    if exported.form == "slow":
        notes.append(str(exported.line))
    rows += [("note", note) for note in notes] + [("WARNING", line) for line in check_export(config)]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def _start_notes(config: Config, start: Start) -> Iterator[str]:
    for folder in dict.fromkeys((Path(config.logging.run_dir), config.save_dir)):
        if holder := holder_of(inside(folder)):
            yield f"{folder} is held by {holder.name} since {holder.began}: this run is refused while that one lives"
    if problem := start.problem(config):
        yield problem
    if start.changed:
        when = "since the checkpoint was saved" if start.weights is None else "for the weights"
        yield f"changed {when}: {'; '.join(start.changed)}"


def _loop_rows(config: Config) -> list[tuple[str, str]]:
    if config.parallel.tensor_model_parallel_size == 1 or not most_kept_heads(config):
        return []
    return [("loops", choose_loop_method(config)[1])]


def _batch_rows(stages: Sequence[Stage], world_size: int, pairs: AttendedPairs | None) -> list[tuple[str, str]]:
    config = stages[-1].config
    steps, lengths = config.train.train_iters, config.seq_lengths
    flops = sum(
        flops_between(stage.config, LoopPlan.empty(stage.config.model.num_layers), stage.first + 1, stage.last, pairs)
        for stage in stages
    )
    return [
        ("layout", layout_line(config, world_size, _shown_precision(config))),
        *(("pipeline", line) for line in pipeline_lines(stages, world_size)),
        *_loop_rows(config),
        ("batch", batch_line(config, world_size)),
        *([("lengths", lengths.text())] if lengths.ends and not config.phases else []),
        *(("phase", line) for line in phase_lines(config)),
        (
            "run",
            f"{steps:,} steps · {config.tokens_between(1, steps):,} tokens · "
            f"{flops:.3g} FLOPs {'before growth' if len(stages) == 1 else 'without loops'}",
        ),
    ]


def precision_of(config: Config) -> str:
    """The precision on this machine, or what is known of it when the run's device is not here."""
    try:
        kind = device_type(config.parallel.device)
    except ConfigError:
        kind = config.parallel.device
    return config.precision_on(kind)


def _shown_precision(config: Config) -> str:
    precision = precision_of(config)
    undecided = config.train.precision == "auto" and config.parallel.device == "auto" and precision == "fp32"
    return f"{precision} (on GPUs bf16)" if undecided else precision
