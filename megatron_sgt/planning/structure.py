"""The structures that a configuration can pass through: before growth, in a window, after the last one. Pure."""

from __future__ import annotations

from megatron_sgt.config import Config
from megatron_sgt.growth import LayerPlan, LoopPlan


def final_plan(config: Config, together: bool = False) -> LoopPlan:
    """The most expensive structure that the configuration can end with (head ids are placeholders).

    Args:
        together: the kept heads are neighbours, on one tensor-parallel rank if it has so many: the worst case of
            looping at their owners. Default: apart, in key/value groups of their own.
    """
    growth, model = config.growth, config.model
    layers = [n for n in range(model.num_layers) if n not in growth.exclude_layers]
    if growth.method == "block_loop":
        repeated = LayerPlan(block_loops=growth.block_loop_count)
        return LoopPlan(model.num_layers, tuple((n, repeated) for n in growth.block_loop_layers))
    if growth.method == "vanilla":
        return LoopPlan.empty(model.num_layers)
    grown = LayerPlan(growth.max_loop_depth, placeholder_heads(config, together))
    return LoopPlan(model.num_layers, tuple((n, grown) for n in layers[-growth.max_selected_layers :]))


def placeholder_heads(config: Config, together: bool) -> tuple[int, ...]:
    """Heads that a layer may keep; apart, they share no keys and values, which costs more operations."""
    growth, model = config.growth, config.model
    count = model.num_attention_heads if growth.head_choice == "all" else growth.num_keep_heads
    stride = 1 if together else max(1, model.num_attention_heads // count)
    return tuple(range(0, stride * count, stride))
