"""The structures that a configuration can pass through, against the schedule itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_sgt.config import Config
from megatron_sgt.growth import LayerPlan, LoopPlan, SGTSchedule
from megatron_sgt.planning.structure import Stretch, final_plan, timeline
from tests.helpers.single import small_config


def test_the_final_plan_is_the_costliest() -> None:
    config = small_config(growth={"max_loop_depth": 2, "num_keep_heads": 2, "max_selected_layers": 2})
    grown = LayerPlan(2, (0, 2))
    assert final_plan(config) == LoopPlan(4, ((2, grown), (3, grown)))
    beside = LayerPlan(2, (0, 1))
    assert final_plan(config, together=True) == LoopPlan(4, ((2, beside), (3, beside)))
    everything = small_config(growth={"head_choice": "all", "max_selected_layers": 1})
    assert final_plan(everything)[3].kept_heads == (0, 1, 2, 3)
    assert final_plan(small_config(growth={"method": "vanilla"})) == LoopPlan.empty(4)
    repeated = small_config(growth={"method": "block_loop", "block_loop_layers": [1], "block_loop_count": 2})
    assert final_plan(repeated) == LoopPlan(4, ((1, LayerPlan(block_loops=2)),))


def scheduled(config: Config) -> list[tuple[int, str, LoopPlan]]:
    """What SGTSchedule executes in every step when entropies always ask for more, gates in a window set to 0.5."""
    growth, model = config.growth, config.model
    schedule = SGTSchedule(growth, model.num_layers, model.num_attention_heads)
    steps = []
    for step in range(1, config.train.train_iters + 1):
        running = step <= schedule.state_dict()["window_end"]
        phase = "vanilla" if schedule.phase == "vanilla" else "window" if running else "fixed"
        layers = tuple(
            (n, LayerPlan(p.loops, p.kept_heads, 0.5 if p.other_gate else 0.0)) for n, p in schedule.plan.layers
        )
        steps.append((step, phase, LoopPlan(model.num_layers, layers)))
        depths = list(schedule.plan.loops)
        unfinished = [n for n, depth in enumerate(depths) if 0 < depth < growth.max_loop_depth]
        state = schedule.state_dict()
        grown = [entry["layer"] for entry in state["grown"]]
        downward = growth.direction == "deep_to_shallow"
        start = model.num_layers - (1 if downward else growth.max_selected_layers)
        following = (min(grown) - 1 if downward else max(grown) + 1) if grown else start
        wanted = unfinished[0] if unfinished else following
        entropy = np.zeros((model.num_layers, 1 + growth.max_loop_depth, model.num_attention_heads))
        heads = final_plan(config)[model.num_layers - 1].kept_heads
        entropy[:, :, list(heads)] = 0.1
        entropy[wanted % model.num_layers] += 0.8
        state["ema"] = entropy[:, 0].tolist()
        schedule.load_state_dict(state)
        schedule.after_step(step)
    return steps


@pytest.mark.parametrize("train_iters", [3, 5, 12, 40])
@pytest.mark.parametrize(
    "growth",
    [
        {},
        {"max_loop_depth": 3},
        {"direction": "shallow_to_deep"},
        {"max_selected_layers": 1, "head_choice": "all"},
    ],
    ids=str,
)
def test_the_timeline_is_what_the_schedule_does_at_most(growth: dict[str, Any], train_iters: int) -> None:
    shape = {"first_selection_step": 4, "window_size": 3, "top_k_layers": 1, "max_selected_layers": 3}
    config = small_config(growth={"max_loop_depth": 1, **shape, **growth}, train={"train_iters": train_iters})
    planned = [
        (step, stretch.phase, stretch.plan)
        for stretch in timeline(config)
        for step in range(stretch.first, stretch.last + 1)
    ]
    assert planned == scheduled(config)


def test_static_methods_have_one_stretch() -> None:
    assert timeline(small_config(growth={"method": "vanilla"})) == [Stretch(1, 10, "vanilla", LoopPlan.empty(4))]
    repeated = small_config(growth={"method": "block_loop", "block_loop_layers": [1]})
    (only,) = timeline(repeated)
    assert (only.phase, only.steps, only.plan) == ("block loop", 10, final_plan(repeated))
