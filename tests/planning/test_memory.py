"""The formula of saved activations against the tensors that are alive between forward and backward pass."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from typing import Any

import pytest

from megatron_sgt.arch.kernels import CPU, GPU
from megatron_sgt.config import Config
from megatron_sgt.data.pieces import cut
from megatron_sgt.engine.build import start_processes
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.apply_plan import apply_plan, begin_step
from megatron_sgt.model.gpt import build_model
from megatron_sgt.planning.memory import activation_memory
from tests.helpers.exhaustive import exhaustive
from tests.helpers.live_memory import LiveMemory
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config

TOLERANCE = 0.05
MODELS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped query": {"num_query_groups": 4},
    "q/k norm, biases, dropout, LayerNorm, GELU": {
        "num_query_groups": 4,
        "qk_layernorm": True,
        "add_bias_linear": True,
        "normalization": "LayerNorm",
        "activation": "gelu",
        "hidden_dropout": 0.1,
    },
    "OLMo-2": {
        "num_query_groups": 4,
        "norm_position": "output",
        "qk_layernorm": True,
        "qk_layernorm_over": "all",
    },
}
PLANS: dict[str, tuple[tuple[int, LayerPlan], ...]] = {
    "vanilla": (),
    "window": ((1, LayerPlan(1, (0, 1), 0.5)),),
    "fixed, depth 1": ((1, LayerPlan(1, (0, 1))),),
    "fixed, depth 2 and 3": ((0, LayerPlan(2, (1, 2, 7))), (1, LayerPlan(3, (6,)))),
    "block loop": ((1, LayerPlan(block_loops=1)),),
}
LAYOUTS = [(1, False, "owner")]
LAYOUTS += [(2, sharded, method) for sharded in (False, True) for method in ("owner", "balanced")]


def memory_config(model: str, ranks: int, sharded: bool, method: str, recompute: str) -> Config:
    """Two layers, wide enough that nothing but activations of note is left."""
    return small_config(
        growth={"top_k_layers": 1, "max_loop_depth": 3},
        model={"num_layers": 2, "num_attention_heads": 8, "seq_length": 64, **MODELS[model]},
        parallel={
            "tensor_model_parallel_size": ranks,
            "sequence_parallel": sharded,
            "loop_method": method,
        },
        train={"recompute_granularity": recompute},
    )


def saved_activations(info: RankInfo, cases: list[tuple[str, bool, str, str]], pieces: int = 1) -> list[str]:
    """Every case in which the formula is further off than TOLERANCE, on this rank, for samples cut into ``pieces``."""
    wrong = []
    for model, sharded, method, recompute in cases:
        config = memory_config(model, info.world_size, sharded, method, recompute)
        groups = start_processes(config, info)
        built = build_model(config, groups, "fp32", 4)
        for name, layers in PLANS.items():
            plan = LoopPlan(2, layers)
            apply_plan(built, plan)
            begin_step(built)
            batch = cut(random_batch(config), pieces)
            built(**batch)  # fills the buffers that stay
            begin_step(built)
            gc.collect()
            with LiveMemory() as memory:
                loss = built(**batch)
            counted = memory.live()
            del loss
            formula = activation_memory(config, plan, "fp32", CPU, groups.tp_rank).saved
            if abs(formula / counted - 1) > TOLERANCE:
                case = f"{model}, {sharded}, {method}, {recompute}, {name}"
                wrong.append(f"{case}: {formula:,} of {counted:,} ({100 * (formula / counted - 1):+.1f} %)")
    return wrong


@pytest.mark.parametrize(("ranks", "every"), [(1, 4), (2, 7), exhaustive((1, 1)), exhaustive((2, 1))])
def test_saved_activations(ranks: int, every: int) -> None:
    """Of the cases of one rank every fourth, of two ranks every seventh; `make test-all` takes all."""
    layouts = [(sharded, method) for size, sharded, method in LAYOUTS if size == ranks]
    product = itertools.product(MODELS, layouts, ("none", "selective", "full"))
    cases = [(model, *layout, recompute) for model, layout, recompute in product]
    cases = [case for case in cases if case[0] != "OLMo-2" or case[2] != "balanced"]
    own = [case for case in cases if case[0] == "OLMo-2" and case[3] == "none"]
    cases = list(dict.fromkeys([*cases[::every], *own]))
    for rank, wrong in enumerate(run_on_ranks(ranks, saved_activations, cases, timeout=600)):
        assert not wrong, f"rank {rank}:\n" + "\n".join(wrong)


def test_shorter_sequences_keep_as_much() -> None:
    """As many tokens: the formula knows no length."""
    cases = [
        ("q/k norm, biases, dropout, LayerNorm, GELU", False, "owner", recompute) for recompute in ("none", "full")
    ]
    assert run_on_ranks(1, saved_activations, cases, 4) == [[]]


def test_gpus_keep_less_by_what_their_kernels_fuse() -> None:
    """No normalised copies."""
    config = memory_config("multi-head", 1, False, "owner", "none")
    on_cpu, on_gpu = (activation_memory(config, LoopPlan.empty(2), "fp32", kernels) for kernels in (CPU, GPU))
    tokens, hidden, element = 2 * 64, 64, 4
    assert on_cpu.layers - on_gpu.layers == 2 * 2 * tokens * hidden * element


def test_on_gpus_attention_in_16_bits_repeats_no_keys() -> None:
    """It keeps keys and values as they are, the values inside the fused projection."""
    config, plan = memory_config("grouped query", 1, False, "owner", "none"), LoopPlan.empty(2)
    repeating = replace(GPU, groups=False)
    tokens, heads, groups, head_size = 2 * 64, 8, 4, 8
    for precision, element, differs in (("bf16", 2, True), ("fp32", 4, False)):
        kept, copied = (activation_memory(config, plan, precision, k).layers for k in (GPU, repeating))
        less = ((heads + 3 * groups) - 2 * heads) * tokens * head_size * element
        assert kept - copied == (2 * less if differs else 0)
