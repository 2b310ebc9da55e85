"""Lines that describe a run: for pretrain_sgt.py --dry-run and for tools/plan.py. Pure."""

from __future__ import annotations

from megatron_sgt.config import Config
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
