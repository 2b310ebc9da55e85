"""Lines that say what a run is: for pretrain_sgt.py --dry-run and for tools/plan.py. Pure."""

from __future__ import annotations

from megatron_sgt.config import Config
from megatron_sgt.metrics.units import count
from megatron_sgt.planning.flops import overhead
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.planning.structure import final_plan


def model_line(config: Config) -> str:
    """Size and shape of the model."""
    model = config.model
    return (
        f"{parameter_count(model):,} parameters · {model.num_layers} layers · hidden {model.hidden_size} · "
        f"{model.num_attention_heads} heads in {model.num_query_groups} groups · T = {model.seq_length}"
    )


def growth_line(config: Config) -> str:
    """What grows, when, and what it adds."""
    model, growth = config.model, config.growth
    if growth.method == "vanilla":
        return "none (vanilla)"
    plan = final_plan(config)
    added = f"{100 * overhead(model, plan):+.2f} % FLOPs"
    if growth.method == "block_loop":
        return f"block loop of layers {list(growth.block_loop_layers)}: {added} from the first step"
    if growth.replay is not None:
        layers = count(sum(layer.loops > 0 for layer in plan), "layer")
        return f"repeats the decisions of {growth.replay}: {layers}, {added} once fixed"
    loops = count(growth.max_loop_depth, "loop")
    heads = "all heads" if growth.head_choice == "all" else count(growth.num_keep_heads, "head")
    return (
        f"up to {count(growth.max_selected_layers, 'layer')} x {heads} x {loops} from step "
        f"{growth.first_selection_step} on, at most {added} once fixed"
    )
