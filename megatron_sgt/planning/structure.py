"""The structures that a configuration can pass through: before growth, in windows, after the last one. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_sgt.config import Config
from megatron_sgt.growth import LayerPlan, LoopPlan, build_schedule
from megatron_sgt.growth.replay import ReplaySchedule


@dataclass(frozen=True)
class Stretch:
    """Steps ``first`` to ``last`` (from 1, both inclusive) execute ``plan``, the gates of a window aside.

    ``phase``: vanilla, block loop, window or fixed.
    """

    first: int
    last: int
    phase: str
    plan: LoopPlan

    @property
    def steps(self) -> int:
        """How many steps."""
        return self.last - self.first + 1


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
    if growth.replay is not None:
        return ReplaySchedule(growth, model.num_layers, model.num_attention_heads).final_plan()
    grown = LayerPlan(growth.max_loop_depth, placeholder_heads(config, together))
    return LoopPlan(model.num_layers, tuple((n, grown) for n in layers[-growth.max_selected_layers :]))


def placeholder_heads(config: Config, together: bool) -> tuple[int, ...]:
    """Heads that a layer may keep; apart, they share no keys and values, which costs more operations."""
    growth, model = config.growth, config.model
    count = model.num_attention_heads if growth.head_choice == "all" else growth.num_keep_heads
    stride = 1 if together else max(1, model.num_attention_heads // count)
    return tuple(range(0, stride * count, stride))


def timeline(config: Config, together: bool = False) -> list[Stretch]:
    """The run from its first to its last step, under the decisions that cost most.

    A layer is selected, or made deeper, whenever the schedule may: which layers a run selects, and whether it stops
    growing early, depends on entropies that are not known before it.
    """
    last = config.train.train_iters
    if config.growth.method != "sgt":
        plan = final_plan(config)
        return [Stretch(1, last, "block loop" if plan.layers else "vanilla", plan)]
    changes = [(0, "vanilla", LoopPlan.empty(config.model.num_layers)), *_decisions(config, together)]
    ends = [step for step, _, _ in changes[1:]] + [last]
    stretches = [
        Stretch(step + 1, min(end, last), phase, plan)
        for (step, phase, plan), end in zip(changes, ends, strict=True)
        if step < last and end > step
    ]
    return stretches


def _decisions(config: Config, together: bool) -> Iterator[tuple[int, str, LoopPlan]]:
    """(step after which it holds, phase, plan) of every decision up to the end of training."""
    growth, model = config.growth, config.model
    if growth.replay is not None:
        yield from _recorded(config)
        return
    excluded = set(growth.exclude_layers)
    free = [n for n in range(model.num_layers) if n not in excluded]
    # The order in which most can be selected: the last ones from the deepest up, or from the shallowest down.
    chosen = free[-growth.max_selected_layers :]
    order = chosen[::-1] if growth.direction == "deep_to_shallow" else chosen
    heads = placeholder_heads(config, together)
    other = 0.0 if len(heads) == model.num_attention_heads else 0.5
    step, grown = growth.first_selection_step, {}
    for layer in order:
        for depth in range(1, growth.max_loop_depth + 1):
            if step >= config.train.train_iters:
                return
            grown[layer] = LayerPlan(depth, heads, other if depth == 1 else 0.0)
            yield step, "window", LoopPlan(model.num_layers, tuple(grown.items()))
            grown[layer] = LayerPlan(depth, heads)
            step += growth.window_size
    yield step, "fixed", LoopPlan(model.num_layers, tuple(grown.items()))


def _recorded(config: Config) -> Iterator[tuple[int, str, LoopPlan]]:
    model = config.model
    schedule = build_schedule(config.growth, model.num_layers, model.num_attention_heads)
    for step in range(1, config.train.train_iters + 1):
        if schedule.decides_at(step):
            (event,) = schedule.after_step(step)
            yield step, "fixed" if event.action == "fixed" else "window", schedule.plan
