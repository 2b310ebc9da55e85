"""Another batch size in a running engine: the gradients of one that was started with it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sgt.compat.release import release_engine
from megatron_sgt.config import Config
from megatron_sgt.engine.accumulation import accumulate
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.step import train_step
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.parallel.groups import ParallelGroups
from tests.helpers.fp16_on_cpu import allow_fp16
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "ZeRO-0": (0, "fp32", {}),
    "ZeRO-1": (1, "fp32", {}),
    "ZeRO-1, bf16": (1, "bf16", {}),
    "ZeRO-1, fp16": (1, "fp16", {}),
    "ZeRO-2": (2, "fp32", {}),
    "ZeRO-2, offloaded": (2, "fp32", OFFLOAD),
    "ZeRO-3": (3, "fp32", {}),
}
SIZES = (1, 1, 1, 2, 1)
"""Micro-batches of the steps: three of one are no multiple of two."""


def config_of(case: str, micro_batches: int) -> Config:
    """A model that no step changes."""
    zero, precision, section = CASES[case]
    return small_config(
        model={"num_layers": 1},
        growth={"method": "vanilla"},
        optim={"lr": 1e-30, "weight_decay": 0.0, "clip_grad": 0.0},
        parallel={"zero_stage": zero},
        deepspeed={"zero_optimization": {"stage": zero, **section}} if zero else {},
        train={"global_batch_size": 2 * micro_batches, "precision": precision},
    )


def steps(case: str, groups: ParallelGroups, sizes: tuple[int, ...]) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of steps that begin with the same micro-batches."""
    config = config_of(case, sizes[0])
    engine = build_runtime(config, groups).engine
    engine.train()
    found = []
    for size in sizes:
        accumulate(engine, size)
        batches = [random_batch(config, seed=number) for number in range(size)]
        result = train_step(engine, batches, 1e-30, 0.0, groups)
        assert result.applied and engine.train_batch_size() == 2 * size
        found.append((float(result.loss), result.grad_norm))
    release_engine(engine)
    return found


def compare(info: RankInfo) -> dict[str, list[Any]]:
    allow_fp16()
    groups = start_processes(config_of("ZeRO-0", 1), info)
    found = {}
    for case in CASES:
        fresh = {size: steps(case, groups, (size,))[0] for size in set(SIZES)}
        found[case] = [steps(case, groups, SIZES), [fresh[size] for size in SIZES]]
    return found


def test_gradients_are_those_of_an_engine_that_was_started_with_the_batch() -> None:
    (found,) = run_on_ranks(1, compare)
    for case, (one_engine, fresh) in found.items():
        assert len({norm for _, norm in fresh}) == 2, "each size has a norm of its own"
        assert one_engine == [pytest.approx(pair, rel=1e-6) for pair in fresh], case
