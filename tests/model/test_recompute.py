"""Recomputed activations under tensor parallelism: the dropout masks are those of the forward pass."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgt.engine.build import start_processes
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.model.gpt import build_model
from tests.helpers.cuda_tracker import TRACKERS, tracker
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config

PLAN = LoopPlan(4, ((1, LayerPlan(2, (0, 3))), (3, LayerPlan(1, (1, 2), 0.5))))
DROPOUTS = {"attention": (0.2, 0.0), "hidden": (0.0, 0.2), "both": (0.2, 0.2)}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full"},
    "full, two layers": {"recompute_granularity": "full", "recompute_layers": (1, 2)},
}
CASES = list(product(TRACKERS, (False, True), DROPOUTS, RECOMPUTE))


def gradients(info: RankInfo, sequence_parallel: bool, dropout: str, train: dict[str, Any]) -> list[Tensor]:
    """Loss and gradients of two micro-batches, then a number of each stream."""
    attention, hidden = DROPOUTS[dropout]
    config = small_config(
        model={"attention_dropout": attention, "hidden_dropout": hidden},
        parallel={"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel},
        train=train,
    )
    model = build_model(config, start_processes(config, info), "fp32", 3).train()
    apply_plan(model, PLAN)
    losses = [model(**random_batch(config, seed)) for seed in (0, 1)]
    for loss in losses:
        loss.backward()
    return [*losses, *(p.grad for p in model.parameters() if p.grad is not None), torch.rand(1)]


def differences(info: RankInfo) -> dict[tuple[str, bool, str, str], float]:
    """By case, the largest relative difference that recomputation makes; -1 if gradients are missing."""
    found = {}
    for name, sequence_parallel, dropout in product(TRACKERS, (False, True), DROPOUTS):
        with tracker(name):
            wanted = gradients(info, sequence_parallel, dropout, {})
            for recompute, train in RECOMPUTE.items():
                again = gradients(info, sequence_parallel, dropout, train)
                assert len(again) == len(wanted) == 30
                pairs = zip(again, wanted, strict=True)
                found[name, sequence_parallel, dropout, recompute] = max(
                    float((a - b).abs().max() / b.abs().max()) for a, b in pairs
                )
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[tuple[str, bool, str, str], float]]:
    return run_on_ranks(2, differences)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masks_are_those_of_the_forward_pass(by_rank: list[dict[Any, float]], case: Any) -> None:
    assert [rank[case] for rank in by_rank] == [0.0, 0.0]
