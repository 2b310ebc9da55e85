"""The moving average of the weights against plain torch, and that lending it to validation changes no later loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from megatron_sgt.config import Config
from megatron_sgt.engine.build import Runtime, build_runtime, start_processes
from megatron_sgt.engine.hooks.ema import EmaHook
from megatron_sgt.engine.step import TrainState, train_step
from megatron_sgt.evaluation.perplexity import mean_loss
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.planning.state_memory import average_bytes
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config

DECAY, STEPS, SKIPPED = 0.75, 5, 2
PLAN = LoopPlan(2, ((1, LayerPlan(1, (0, 3))), (0, LayerPlan(1, (1, 2), other_gate=0.5))))
MODEL = {
    "num_layers": 2, "hidden_size": 18, "num_attention_heads": 4, "kv_channels": 6, "ffn_hidden_size": 12,
    "hidden_dropout": 0.1,
}  # fmt: skip
"""So small, and of such sizes, that ZeRO pads its groups."""
SPREAD = {"stage3_param_persistence_threshold": 0}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "zero 0": {"parallel": {"zero_stage": 0}},
        "zero 1, bf16": {"parallel": {"zero_stage": 1}, "train": {"precision": "bf16"}},
        "zero 1, offloaded": {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
        "zero 2": {"parallel": {"zero_stage": 2}, "optim": {"weight_decay_on": "matrices"}},
        "zero 3": {"parallel": {"zero_stage": 3}, "deepspeed": {"zero_optimization": SPREAD}},
        "zero 3, bf16": {"parallel": {"zero_stage": 3}, "train": {"precision": "bf16"}},
    },
    2: {"tensor parallel": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}},
}
"""Tensor-parallel size -> settings, of two ranks."""
NAMES = [(tensor, name) for tensor, cases in CASES.items() for name in cases]


def watch(info: RankInfo, tensor: int) -> dict[str, dict[str, Any]]:
    """Train each case of a tensor-parallel size with the average and without; for ``run_on_ranks``."""
    return {name: watch_one(info, case) for name, case in CASES[tensor].items()}


def watch_one(info: RankInfo, case: dict[str, Any]) -> dict[str, Any]:
    config = small_config(
        **{
            **case,
            "model": MODEL,
            "growth": {"top_k_layers": 1},
            "train": {"global_batch_size": 8, "ema_decay": DECAY, **case.get("train", {})},
        }
    )
    groups = start_processes(config, info)
    without, _ = losses_of(config, groups, None)
    seen: dict[str, Any] = {"weights": [], "validated": []}

    def look(runtime: Runtime, hook: EmaHook) -> None:
        seen["weights"].append(masters(runtime))
        before, held_out = computed_with(runtime), [random_batch(config, seed=9)]
        outside = mean_loss(runtime.engine, held_out, groups)
        with hook.swapped_in():
            seen["validated"].append((outside, mean_loss(runtime.engine, held_out, groups)))
            seen["average"], inside = masters(runtime), computed_with(runtime)
        assert all(torch.equal(tensor, before[name]) for name, tensor in computed_with(runtime).items())
        assert all(torch.equal(tensor, seen["average"][name].to(tensor.dtype)) for name, tensor in inside.items())

    seen["losses"], hook = losses_of(config, groups, look)
    assert hook is not None
    seen["bytes"] = hook.average.num_bytes, average_bytes(config, info.world_size, config.precision_on("cpu"))
    return {"losses without": without, **seen}


def losses_of(config: Config, groups: ParallelGroups, look: Callable[[Runtime, EmaHook], None] | None) -> Any:
    """The losses of STEPS steps, one of them skipped; with ``look``, which looks around them, also the hook."""
    torch.manual_seed(7 + groups.dp_rank)  # of the dropout
    runtime = build_runtime(config, groups)
    apply_plan(runtime.model, PLAN)
    runtime.engine.train()
    hook = None if look is None else EmaHook(runtime.engine, DECAY, groups)
    losses = []
    for step in range(STEPS + 1):
        if look is not None and hook is not None:
            look(runtime, hook)
        seeds = [100 * step + 10 * groups.dp_rank + n for n in range(config.num_micro_batches(groups.world_size))]
        batches = [random_batch(config, seed) for seed in seeds]
        if step == SKIPPED:
            batches[0]["loss_mask"][0, 3] = math.nan
        result = train_step(runtime.engine, batches, 1e-2, 1.0, groups)
        assert result.applied is (step != SKIPPED)
        if hook is not None:
            hook.after_step(TrainState(step), result)
        losses.append(float(result.loss))
    return losses, hook


def masters(runtime: Runtime) -> dict[str, Tensor]:
    """Whole fp32 weights, as the optimizer has them."""
    named = runtime.model.named_parameters()
    if runtime.engine.zero_optimization_stage() == 0:
        return {name: p.detach().clone() for name, p in named}
    return {name: safe_get_full_fp32_param(p).detach().clone() for name, p in named}


def computed_with(runtime: Runtime) -> dict[str, Tensor]:
    """Whole weights, as the model has them."""
    found = {}
    for name, parameter in runtime.model.named_parameters():
        spread = runtime.engine.zero_optimization_stage() == 3
        with deepspeed.zero.GatheredParameters([parameter], enabled=spread):
            found[name] = parameter.detach().clone()
    return found


@cache
def watched(tensor: int) -> list[dict[str, dict[str, Any]]]:
    return run_on_ranks(2, watch, tensor)


def reference(seen: dict[str, Any], updates: Iterable[int], decay: float = DECAY) -> dict[str, Tensor]:
    """The definition, in fp64: average = decay · average + (1 - decay) · weights, after each step of ``updates``."""
    average = {name: tensor.double() for name, tensor in seen["weights"][0].items()}
    for step in updates:
        average = {n: decay * a + (1 - decay) * seen["weights"][step][n].double() for n, a in average.items()}
    return average


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())


@pytest.mark.parametrize(("tensor", "name"), NAMES)
def test_it_is_the_average_of_the_applied_steps(tensor: int, name: str) -> None:
    """Weights were looked at before step n + 1, that is after step n (the first look: before all); one was skipped."""
    applied = [step for step in range(1, STEPS + 1) if step != SKIPPED + 1]
    for rank in watched(tensor):
        seen = rank[name]
        assert distance(seen["average"], reference(seen, applied)) <= 1e-6
        # Controls: what it would be if the skipped step counted, if the first did not, and with another decay.
        assert distance(seen["average"], reference(seen, range(1, STEPS + 1))) > 1e-4
        assert distance(seen["average"], reference(seen, applied[1:])) > 1e-4
        assert distance(seen["average"], reference(seen, applied, DECAY + 0.01)) > 1e-4
        assert distance(seen["average"], seen["weights"][-1]) > 1e-3


@pytest.mark.parametrize(("tensor", "name"), NAMES)
def test_lending_it_changes_no_later_loss(tensor: int, name: str) -> None:
    for rank in watched(tensor):
        seen = rank[name]
        assert math.isnan(seen["losses"][SKIPPED])
        assert repr(seen["losses"]) == repr(seen["losses without"])
        assert len(set(seen["losses"])) == STEPS + 1
        first, *later = seen["validated"]
        assert first[0] == first[1]
        assert all(math.isfinite(averaged) and averaged != loss for loss, averaged in later)


@pytest.mark.parametrize(("tensor", "name"), NAMES)
def test_the_plan_counts_its_bytes(tensor: int, name: str) -> None:
    for rank in watched(tensor):
        kept, planned = rank[name]["bytes"]
        assert kept == planned
