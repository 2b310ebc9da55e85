"""Lines that say what a run is: for pretrain_sgt.py --dry-run and for tools/plan.py. Pure."""

from __future__ import annotations

from megatron_sgt.config import Config
from megatron_sgt.config.base import counted
from megatron_sgt.planning.flops import overhead
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.planning.structure import schedule_of


def model_line(config: Config) -> str:
    """Size and shape of the model."""
    model = config.model
    return (
        f"{parameter_count(model):,} parameters · {model.num_layers} layers · hidden {model.hidden_size} · "
        f"{model.num_attention_heads} heads in {model.num_query_groups} groups · T = {model.seq_length}"
    )


def growth_line(config: Config) -> str:
    """What grows, when, and what it adds."""
    schedule = schedule_of(config)
    return schedule.describe(f"{100 * overhead(config.model, schedule.final_plan()):+.2f} % FLOPs")


def layout_line(config: Config, world_size: int, precision: str) -> str:
    """How the ranks share the model."""
    parallel = config.parallel
    stage = config.zero_stage_on(world_size, precision)
    return (
        f"{counted(world_size, 'rank')} = tensor parallel {parallel.tensor_model_parallel_size} x data parallel "
        f"{config.data_parallel_size(world_size)} · ZeRO-{stage} · {precision}"
    )


def batch_line(config: Config, world_size: int) -> str:
    """The batch arithmetic. Raises ConfigError where it does not work out."""
    train = config.train
    return (
        f"{train.global_batch_size} sequences = micro {train.micro_batch_size} x accumulation "
        f"{config.num_micro_batches(world_size)} x data parallel {config.data_parallel_size(world_size)} · "
        f"{train.global_batch_size * config.model.seq_length:,} tokens per step"
    )
