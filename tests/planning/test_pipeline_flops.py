"""FLOPs of a pipeline: the stages together execute what the formula says, counted by torch on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.step import train_step
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.planning.flops import step_flops
from tests.helpers.exhaustive import share_of
from tests.helpers.flops import flop_counter
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config

PLAN = LoopPlan(8, ((1, LayerPlan(1, (0, 3), 0.5)), (6, LayerPlan(2, (0, 1))), (4, LayerPlan(block_loops=1))))
CASES = [("4,4", 1, False), ("1,3,2,2", 2, False), ("5,3", 1, True), ("2,2,2,2", 2, True)]


def config_of(layout: str, virtual: int, tied: bool) -> Any:
    return small_config(
        model={"num_layers": 8, "untie_embeddings_and_output_weights": not tied},
        parallel={
            "device": "cpu",
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": virtual,
            "pipeline_model_parallel_layout": layout,
        },
        train={"micro_batch_size": 2, "global_batch_size": 8, "threads_per_rank": 1},
        growth={"num_keep_heads": 2, "max_loop_depth": 2},
        deepspeed={"zero_optimization": {"overlap_comm": False}},
    )


def counted(info: RankInfo, layout: str, virtual: int, tied: bool) -> int:
    config = config_of(layout, virtual, tied)
    groups = start_processes(config, info)
    runtime = build_runtime(config, groups)
    apply_plan(runtime.model, PLAN)
    runtime.model.meter.enabled = True
    runtime.engine.train()
    batches: list[dict[str, Tensor]] = [random_batch(config) for _ in range(4)]
    with flop_counter() as counter:
        result = train_step(runtime.engine, batches, 1e-3, 1.0, groups)
    assert result.applied and torch.isfinite(result.loss)
    return counter.get_total_flops()


@pytest.mark.parametrize(("layout", "virtual", "tied"), share_of(CASES, CASES[1:2]))
def test_stages_add_up_to_the_formula(layout: str, virtual: int, tied: bool) -> None:
    found = run_on_ranks(2, counted, layout, virtual, tied, backend="gloo")
    config = config_of(layout, virtual, tied)
    assert min(found) > 0
    assert sum(found) == step_flops(config.model, PLAN, 8, True).executed
