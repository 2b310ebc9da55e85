"""The formula of weights, gradients and optimizer state against the tensors that are alive around a step."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from megatron_sgt.arch.weights import weights
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.step import train_step
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.planning.state_memory import average_bytes, state_memory
from tests.helpers.exhaustive import exhaustive
from tests.helpers.fp16_on_cpu import allow_fp16
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config

TOLERANCE = 0.05
SPREAD = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
ZERO: list[tuple[int, str, str]] = [
    (0, "fp32", "fp32"),
    (1, "fp32", "fp32"),
    *((stage, "bf16", summed) for stage in (1, 2, 3) for summed in ("fp32", "model")),
    (1, "fp16", "fp32"),
]
"""(ZeRO stage, precision, optim.grad_accum_dtype)"""
SHARE = [case for case in ZERO if case not in ((1, "fp32", "fp32"), (1, "bf16", "model"), (2, "bf16", "fp32"))]


def live_state(info: RankInfo, cases: list[tuple[int, str, str]]) -> list[str]:
    """Weights and optimizer state after a step, gradients before it, on two data-parallel ranks."""
    wrong = []
    allow_fp16()
    for stage, precision, summed in cases:
        zero = {"reduce_bucket_size": 1000, "stage3_max_reuse_distance": 0} if stage else {}
        zero |= SPREAD if stage == 3 else {}
        config = small_config(
            growth={"top_k_layers": 1},
            model={"num_layers": 2, "hidden_size": 256, "num_attention_heads": 8, "seq_length": 16},
            deepspeed={"zero_optimization": zero, "fp16": {"initial_scale_power": 4}} if zero else {},
            optim={"grad_accum_dtype": summed},
            parallel={"zero_stage": stage},
            train={"precision": precision, "global_batch_size": 4 * info.world_size},
        )
        groups = start_processes(config, info)
        before = {id(t): t for t in _tensors()}
        runtime = build_runtime(config, groups)
        held: dict[str, int] = {}
        real = runtime.engine.step

        def step(real: Any = real, held: dict[str, int] = held, before: Any = before) -> None:
            if not held:
                held["first micro-batch"] = _bytes(before)
            real()

        batches = [random_batch(config, seed) for seed in (0, 1)]
        train_step(runtime.engine, batches, 1e-3, 1.0, groups)  # makes the optimizer's moments
        runtime.engine.step = step
        train_step(runtime.engine, batches, 1e-3, 1.0, groups)
        held["after"] = _bytes(before)
        state = state_memory(config, info.world_size, precision)
        stay = stage == 3 or config.has_bf16_optimizer(precision)
        for moment, formula in (
            ("after", state.weights + state.optimizer + (state.gradients if stay else 0)),
            ("first micro-batch", state.weights + state.optimizer + state.gradients),
        ):
            if abs(formula / held[moment] - 1) > TOLERANCE:
                wrong.append(f"ZeRO-{stage} {precision} {summed} {moment}: {formula:,} of {held[moment]:,}")
        del runtime, real, step
        gc.collect()
    return wrong


def _tensors() -> list[torch.Tensor]:
    gc.collect()
    found = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    return found + [t.grad for t in found if t.is_leaf and t.grad is not None]


def _bytes(before: dict[int, torch.Tensor]) -> int:
    """Of the tensors that Python can reach and that are not in ``before``, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors() if id(t) not in before}
    return sum(storages.values())


@pytest.mark.parametrize("cases", [SHARE, exhaustive(ZERO)], ids=["a share", "all"])
def test_weights_gradients_and_optimizer_by_zero_stage(cases: list[tuple[int, str, str]]) -> None:
    for rank, wrong in enumerate(run_on_ranks(2, live_state, cases, timeout=300)):
        assert not wrong, f"rank {rank}:\n" + "\n".join(wrong)


def test_zero_3_pads_each_parameter_of_an_average_and_zero_2_each_group() -> None:
    """Against the parts of three ranks, counted one by one; the built ones: tests/engine/hooks/test_ema.py."""
    odd = {"hidden_size": 20, "num_attention_heads": 2, "kv_channels": 4, "ffn_hidden_size": 14, "vocab_size": 128}
    optim = {"weight_decay_on": "matrices"}
    sizes = [(w.decays, w.elements) for w in weights(small_config(model=odd).model)]
    expected = {
        0: sum(size for _, size in sizes),
        2: sum(-(-sum(size for decays, size in sizes if decays is kind) // 6) * 2 for kind in (True, False)),
        3: sum(-(-size // 3) for _, size in sizes),
    }
    for stage, elements in expected.items():
        sections: dict[str, Any] = {"model": odd, "optim": optim, "parallel": {"zero_stage": stage}}
        config = small_config(**sections, train={"ema_decay": 0.9})
        assert average_bytes(config, 3, "fp32") == state_memory(config, 3, "fp32").average == 4 * elements
        assert average_bytes(small_config(**sections), 3, "fp32") == 0
    assert 4 * expected[3] * 3 > 4 * expected[0]
    there = small_config(
        deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, train={"ema_decay": 0.9}
    )
    assert state_memory(there, 2, "bf16").average == 0 < average_bytes(there, 2, "bf16")


def test_what_is_offloaded_lies_elsewhere() -> None:
    section = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    here, there = (small_config(deepspeed=values) for values in ({}, section))
    assert state_memory(there, 2, "bf16").optimizer == 0 < state_memory(here, 2, "bf16").optimizer


def buffers(precision: str, stage: int, optim: dict[str, str], zero: dict[str, object]) -> int:
    """On two ranks with nothing else than a bucket of 1000 elements."""
    config = small_config(
        parallel={"zero_stage": stage},
        optim=optim,
        deepspeed={"zero_optimization": {"reduce_bucket_size": 1000, "stage3_max_live_parameters": 0, **zero}},
    )
    return state_memory(config, 2, precision).buffers


def test_what_the_reduction_needs() -> None:
    travel = {"grad_reduce_dtype": "model"}
    count = parameter_count(small_config().model, 1)
    offload = {"offload_optimizer": {"device": "cpu"}}
    for case, expected in (
        (("fp32", 1, {}, {}), 4000),
        (("bf16", 1, {}, {}), 0),
        (("bf16", 1, travel, {}), 2 * count),
        (("bf16", 1, {"grad_accum_dtype": "model", **travel}, {}), 2000),
        (("fp16", 1, {}, {}), 4000 + 4 * count // 2),
        (("bf16", 1, {}, offload), 4000 + 4 * count // 2),
        (("bf16", 2, {}, {}), 2000 + 4000),
        (("bf16", 2, {}, {"overlap_comm": True}), 2 * 2000 + 4000),
        (("bf16", 2, travel, {}), 2000),
        (("bf16", 3, {}, {}), 4000),
        (("bf16", 3, travel, {}), 2000),
    ):
        assert buffers(*case) == expected, case
