"""Balanced looping equals owner-local looping, its definition: outputs, entropies and all gradients."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sgt.engine.build import start_processes
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model import kept_weights
from megatron_sgt.model.apply_plan import apply_plan, begin_step, mark_micro_batch
from megatron_sgt.model.gpt import build_model
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config

TOLERANCE = 1e-6
"""fp32, on gradients of order 0.1 to 1."""

MODELS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped query": {"num_query_groups": 4},
    "norms of outputs": {"num_query_groups": 4, "norm_position": "output"},
    "q/k norm, biases": {"num_query_groups": 4, "qk_layernorm": True, "add_bias_linear": True},
}
PLANS: dict[str, LayerPlan] = {
    "one rank": LayerPlan(1, (0, 1)),
    "several ranks, twice": LayerPlan(2, (1, 2, 7)),
    "one head, three times": LayerPlan(3, (6,)),
    "all heads": LayerPlan(1, tuple(range(8))),
}


def _step(info: RankInfo, method: str, model: dict[str, Any], plan: LayerPlan, sequence_parallel: bool) -> Any:
    """Two micro-batches through one model: (losses, gradients, entropies) of this rank."""
    config = small_config(
        model={"num_layers": 2, "num_attention_heads": 8, **model},
        parallel={
            "tensor_model_parallel_size": info.world_size,
            "loop_method": method,
            "sequence_parallel": sequence_parallel,
        },
        growth={"max_loop_depth": 3, "exclude_layers": [], "top_k_layers": 2},
    )
    groups = start_processes(config, info)
    built = build_model(config, groups, "fp32", 4)
    apply_plan(built, LoopPlan(2, ((0, plan), (1, LayerPlan(1, (3, 4))))))
    built.meter.enabled = True
    begin_step(built)
    losses = []
    for seed in (0, 1):
        mark_micro_batch(built, last=seed == 1)
        loss = built(**random_batch(config, seed))
        loss.backward()
        built.meter.end_micro_batch()
        losses.append(float(loss))
    gradients = {name: p.grad.clone() for name, p in built.named_parameters()}
    return losses, gradients, torch.from_numpy(built.meter.reduce(groups))


def compare(info: RankInfo, sequence_parallel: bool) -> dict[str, float]:
    """Largest difference between the two ways on this rank, for every model and plan."""
    worst = {}
    for model_name, model in MODELS.items():
        for plan_name, plan in PLANS.items():
            one, other = (_step(info, method, model, plan, sequence_parallel) for method in ("owner", "balanced"))
            gaps = [abs(a - b) for a, b in zip(one[0], other[0], strict=True)]
            gaps += [float((one[1][name] - other[1][name]).abs().max()) for name in one[1]]
            gaps.append(float((one[2] - other[2]).abs().max()))
            worst[f"{model_name}, {plan_name}"] = max(gaps)
    return worst


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence parallel"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_owner_local_looping(world_size: int, sequence_parallel: bool) -> None:
    for rank, gaps in enumerate(run_on_ranks(world_size, compare, sequence_parallel)):
        too_far = {case: gap for case, gap in gaps.items() if not gap <= TOLERANCE}
        assert not too_far, f"rank {rank}: {too_far}"


def _collectives(info: RankInfo, recompute: str) -> tuple[int, int]:
    """All-reduces of kept weights in a step of three micro-batches and three passes: (fetched, returned)."""
    config = small_config(
        growth={"max_loop_depth": 3},
        parallel={
            "tensor_model_parallel_size": info.world_size,
            "loop_method": "balanced",
            "sequence_parallel": True,
        },
        train={"recompute_granularity": recompute},
    )
    built = build_model(config, start_processes(config, info), "fp32", 4)
    apply_plan(built, LoopPlan(4, ((3, LayerPlan(3, (0, 1))),)))
    calls = {"forward": 0, "backward": 0}
    phase, real = "forward", dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[phase] += 1
        return real(*args, **kwargs)

    kept_weights.dist = SimpleNamespace(all_reduce=counted)  # type: ignore[assignment]
    begin_step(built)
    for seed in range(3):
        mark_micro_batch(built, last=seed == 2)
        phase = "forward"
        loss = built(**random_batch(config, seed))
        phase = "backward"
        loss.backward()
    return calls["forward"], calls["backward"]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_kept_weights_travel_once_per_step_each_way(recompute: str) -> None:
    """W_qkv and W_o of one layer, whatever the number of micro-batches and passes."""
    assert run_on_ranks(2, _collectives, recompute) == [(2, 2), (2, 2)]


def _stale(info: RankInfo) -> float:
    """Loss difference between kept weights fetched once and fetched after the weights have changed."""
    config = small_config(parallel={"tensor_model_parallel_size": info.world_size, "loop_method": "balanced"})
    built = build_model(config, start_processes(config, info), "fp32", 3)
    apply_plan(built, LoopPlan(4, ((3, LayerPlan(1, (0, 1))),)))
    batch = random_batch(config)
    with torch.no_grad():
        built(**batch)
        for parameter in built.parameters():
            parameter.mul_(1.5)
        before = float(built(**batch))
        begin_step(built)
        return abs(float(built(**batch)) - before)


def test_kept_weights_are_fetched_again_in_every_step() -> None:
    assert all(gap > 1e-4 for gap in run_on_ranks(2, _stale))
