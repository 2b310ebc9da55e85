"""The structures that a configuration can pass through, against the schedule itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_sgt.config import Config
from megatron_sgt.growth import LayerPlan, LoopPlan, SGTSchedule
from megatron_sgt.growth.inherit import Inheritance
from megatron_sgt.planning.flops import step_flops
from megatron_sgt.planning.structure import Stretch, final_plan, stage_timelines, timeline
from megatron_sgt.stages.stages import stages_of
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
    growth, steps = config.growth, []
    schedule: SGTSchedule | None = None
    for stage in stages_of(config):
        model, older = stage.config.model, schedule
        schedule = SGTSchedule(stage.config.growth, model.num_layers, model.num_attention_heads)
        if older is not None and stage.grown is not None:
            made = stage.grown.growth
            schedule.inherit(older, Inheritance(made.layers, made.heirs, made.heads))
        for step in range(stage.first + 1, stage.last + 1):
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
            while downward and following in stage.config.growth.exclude_layers[1:]:
                following -= 1
            wanted = unfinished[0] if unfinished else following
            entropy = np.zeros((model.num_layers, 1 + growth.max_loop_depth, model.num_attention_heads))
            heads = final_plan(stage.config)[model.num_layers - 1].kept_heads
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


STAGES: dict[str, list[dict[str, Any]]] = {
    "g_stack": [{"until_steps": 8, "operator": "g_stack", "options": {"factor": 2}}],
    "midas twice": [
        {"until_steps": 4, "operator": "midas", "options": {"block_size": 2}},
        {"until_steps": 12, "operator": "midas", "options": {"block_size": 2}},
    ],
    "after growth": [{"until_steps": 13, "operator": "msg", "options": {"ffn_hidden_size": 128, "num_layers": 6}}],
    "fixed before": [{"until_steps": 30, "operator": "g_stack", "options": {"factor": 2}}],
}


@pytest.mark.parametrize("most", [3, 5])
@pytest.mark.parametrize("stages", STAGES)
def test_the_schedule_goes_on_where_the_model_grows(stages: str, most: int) -> None:
    """By its cost in every step: which layer is selected is a matter of entropies. 5: more than the first model has.

    Copies between layers that loop are never selected, which the plan does not know.
    """
    config = small_config(
        growth={
            "first_selection_step": 4, "window_size": 3, "top_k_layers": 1, "max_selected_layers": most,
            "max_loop_depth": 1, "stages": STAGES[stages],
        },
        train={"train_iters": 40},
    )  # fmt: skip
    models = {step: s.config.model for s in stages_of(config) for step in range(s.first + 1, s.last + 1)}
    planned = [
        (step, stretch.phase, step_flops(models[step], stretch.plan, 1).model)
        for stretches in stage_timelines(stages_of(config))
        for stretch in stretches
        for step in range(stretch.first, stretch.last + 1)
    ]
    trained = [(n, phase, step_flops(models[n], plan, 1).model) for n, phase, plan in scheduled(config)]
    if (stages, most) == ("midas twice", 5):
        assert planned[:16] == trained[:16] and all(
            a[2] > b[2] for a, b in zip(planned[16:], trained[16:], strict=True)
        )
    else:
        assert planned == trained
