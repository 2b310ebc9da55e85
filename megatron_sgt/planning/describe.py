"""Lines that describe a run: for pretrain_sgt.py --dry-run and for tools/plan.py. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_sgt.config import Config
from megatron_sgt.config.base import count
from megatron_sgt.metrics.units import si
from megatron_sgt.planning.flops import overhead
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.planning.pipeline import describe_cut
from megatron_sgt.planning.structure import schedule_of
from megatron_sgt.stages.stages import Stage

_EQUAL = 0.0005
"""Imbalance of stages that is shown as none."""


def model_line(config: Config) -> str:
    """Size and shape of the model."""
    model = config.model
    scaling = "" if model.rotary_scaling is None else f" · rotary {model.rotary_scaling.describe()}"
    return (
        f"{parameter_count(model):,} parameters · {model.num_layers} layers · hidden {model.hidden_size} · "
        f"{model.num_attention_heads} heads in {model.num_query_groups} groups · T = {model.seq_length}{scaling}"
    )


def growth_line(config: Config) -> str:
    """What grows, when, and what it adds."""
    schedule = schedule_of(config)
    return schedule.describe(f"{100 * overhead(config.model, schedule.final_plan()):+.2f} % FLOPs")


def pipeline_lines(stages: Sequence[Stage], world_size: int) -> list[str]:
    """How a pipeline cuts each of the models that a run passes through; nothing without one."""
    lines = []
    for stage in stages:
        if cut := describe_cut(stage.config, world_size):
            layers = count(stage.config.model.num_layers, "layer")
            lines.append((f"growth stage {stage.index} ({layers}): " if len(stages) > 1 else "") + cut_line(cut))
    return lines


def cut_line(cut: dict[str, Any]) -> str:
    """What ``describe_cut`` says, as a line."""
    layers, even, number = ",".join(map(str, cut["layers"])), cut["even"], cut["micro_batches"]
    chunks = f" in chunks of {cut['layout']}" if cut["chunks"] > 1 else ""
    # Chunks wait for each other, so that the largest stage alone does not say what a step loses.
    what, key = ("step over that of equal chunks", "loss") if chunks else ("largest stage over the mean", "imbalance")
    other = "as the even cut" if even["layout"] == cut["layout"] else f"even cut: {_shares(even[key])}"
    growth = ""
    if "final" in cut["imbalance"]:
        growth = f" · growth lengthens a step by {100 * cut['growth']:.2f} % (even cut: {100 * even['growth']:.2f} %)"
    bubble = "bubble of equal stages" if max(cut["imbalance"].values()) >= _EQUAL else "bubble"
    return (
        f"{layers} layers{chunks} · {what} {_shares(cut[key])} ({other}) · "
        f"{bubble} {100 * cut['bubble']:.1f} % of a step ({number} micro-batch{'' if number == 1 else 'es'}){growth}"
    )


def _shares(of: dict[str, float]) -> str:
    names = {"now": "now", "final": "after growth"} if len(of) > 1 else {"now": ""}
    return ", ".join(f"{100 * of[key]:+.1f} % {name}".rstrip() for key, name in names.items())


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
