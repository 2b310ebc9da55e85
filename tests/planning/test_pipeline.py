"""How a pipeline cuts the model, and what the cut costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.config import Config, load_config, parse_config
from megatron_sgt.config.pipeline import PipelineLayout
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.pipeline import bubble, cut_cost, even_cut, expected_plan, pipeline_layout, pipeline_time
from tests.helpers.pipeline_schedule import simulated_time
from tests.helpers.runs import TINY
from tests.helpers.single import small_config

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"


def example(size: str, stages: int, virtual: int = 1, **growth: Any) -> Config:
    """An example over ``stages`` pipeline stages, with loops as ``growth`` says."""
    settings = {f"growth.{name}": value for name, value in growth.items()} | {
        "model.vocab_size": 32000,
        "parallel.pipeline_model_parallel_size": stages,
        "parallel.virtual_pipeline_model_parallel_size": virtual,
        "parallel.zero_stage": 1,
        "train.micro_batch_size": 1,
    }
    return load_config(
        EXAMPLES / f"sgt_{size}.yaml", [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    )


def grown_over_vanilla(config: Config, layout: PipelineLayout, micro_batches: int) -> float:
    """What the three looping layers add to a step, as a share."""
    plans = expected_plan(config), LoopPlan.empty(config.model.num_layers)
    grown, vanilla = (cut_cost(config, plan, layout).step(micro_batches) for plan in plans)
    return grown / vanilla - 1


def test_without_a_pipeline_one_stage_has_all() -> None:
    config = parse_config({**TINY, "model": {**TINY["model"], "vocab_size": 64}})
    assert pipeline_layout(config) == PipelineLayout(1, (config.model.num_layers,))


@pytest.mark.parametrize(("depth", "split_for_growth", "even"), [(1, 0.13, 2.01), (2, 0.25, 4.02), (3, 0.38, 6.03)])
def test_three_looped_layers_cost_a_tenth_of_what_they_cost_the_even_cut(
    depth: int, split_for_growth: float, even: float
) -> None:
    """1.2B, 24 layers, T 4096, over 4 stages with 16 micro-batches; per cent of the step."""
    config = example("1.2b", 4, max_loop_depth=depth)
    layout = pipeline_layout(config)
    assert layout.counts == (6, 6, 7, 5)
    assert 100 * grown_over_vanilla(config, layout, 16) == pytest.approx(split_for_growth, abs=0.005)
    assert 100 * grown_over_vanilla(config, even_cut(layout), 16) == pytest.approx(even, abs=0.005)
    vanilla = LoopPlan.empty(24)
    now, even_now = (cut_cost(config, vanilla, cut).loss(16) for cut in (layout, even_cut(layout)))
    assert 100 * now == pytest.approx(9.17, abs=0.005) and 100 * even_now == pytest.approx(10.25, abs=0.005)


def test_70b_over_eight_stages_has_no_better_cut_than_the_even_one() -> None:
    config = example("70b", 8, max_loop_depth=3)
    layout = pipeline_layout(config)
    assert layout.counts == (10,) * 8
    assert grown_over_vanilla(config, layout, 32) == pytest.approx(0.0086, abs=0.00005)


@pytest.mark.parametrize(
    "growth", [{"head_choice": "all"}, {"method": "block_loop", "block_loop_layers": [21, 22, 23]}]
)
def test_heavier_loops_move_the_cut(growth: dict[str, Any]) -> None:
    config = example("1.2b", 4, **growth)
    grown, layout = expected_plan(config), pipeline_layout(config)
    even, cut = (cut_cost(config, grown, one) for one in (even_cut(layout), layout))
    assert layout.layers(3)[0] > 18  # the last stage holds fewer than an even share
    assert cut.imbalance < even.imbalance / 2


def test_layers_that_are_recomputed_count_for_more() -> None:
    config = small_config(
        model={"num_layers": 8, "vocab_size": 64, "hidden_size": 256, "ffn_hidden_size": 1024},
        parallel={"pipeline_model_parallel_size": 2},
        train={"recompute_granularity": "full", "recompute_layers": [0, 1, 2]},
        growth={"method": "vanilla"},
    )
    assert pipeline_layout(config).counts == (4, 4)
    every = config.model_copy(update={"train": config.train.model_copy(update={"recompute_layers": (5, 6, 7)})})
    assert pipeline_layout(every).counts == (5, 3)


def test_the_time_of_a_step() -> None:
    assert pipeline_time([3, 5, 4], 3, 8) == 7 * 5 + 12  # 1F1B
    assert pipeline_time([2, 2, 2, 2], 2, 6) == 6 * 4 + 4 / 2
    assert bubble(4, 1, 16) == 3 / 19 and bubble(4, 2, 16) == 3 / 35
    equal, rounds = [1.0] * 8, 16
    assert 1 - rounds * 2.0 / pipeline_time(equal, 4, rounds) == pytest.approx(bubble(4, 2, rounds))


@pytest.mark.parametrize(
    ("size", "stages", "virtual", "micro_batches"),
    [
        ("70b", 16, 2, 128),
        ("70b", 16, 4, 64),
        ("70b", 8, 4, 128),
        ("7b", 8, 2, 32),
        ("1.2b", 4, 2, 16),
        ("13b", 8, 2, 32),
    ],
)
def test_no_interleaved_step_is_slower_than_that_of_the_even_cut(
    size: str, stages: int, virtual: int, micro_batches: int
) -> None:
    config = example(size, stages, virtual)
    plan, layout = expected_plan(config), pipeline_layout(config)
    auto, even = (
        simulated_time(cut_cost(config, plan, cut).chunks, stages, micro_batches) for cut in (layout, even_cut(layout))
    )
    assert auto <= even
    assert cut_cost(config, plan, layout).step(micro_batches) == pytest.approx(auto, rel=0.01)
