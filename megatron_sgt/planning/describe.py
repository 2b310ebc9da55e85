"""Lines that describe a run: for pretrain_sgt.py --dry-run and for tools/plan.py. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sgt.config import Config
from megatron_sgt.metrics.units import si
from megatron_sgt.planning.flops import overhead
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.planning.structure import schedule_of
from megatron_sgt.stages.stages import Stage


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


def stages_line(stages: Sequence[Stage]) -> str:
    """The models that a run passes through, and where each grows into the next."""
    parts = []
    for stage in stages:
        model = stage.config.model
        size = si(parameter_count(model), " ").replace(" G", " B")
        text = f"{model.num_layers} layers, {size} parameters"
        if stage.grown is not None:
            text = f"{stage.grown.settings.operator} after step {stage.first:,}: {text}"
        parts.append(text)
    return " · ".join(parts)
