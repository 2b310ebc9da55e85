"""What is not finite on one rank of a pipeline skips the step on all of them, at every ZeRO stage and precision.

One rank meets it, on any stage: a loss, an entropy, a hidden state, a gradient of one copy of a replicated weight. No
weight and no moment changes anywhere, and the step after it trains on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_sgt.engine.build import Runtime, build_runtime, start_processes
from megatron_sgt.engine.hooks.replicas import verify_replicas
from megatron_sgt.engine.step import Batch, StepResult, train_step
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.parallel.groups import ParallelGroups
from tests.engine.test_step import _collect_tensors, same
from tests.helpers.exhaustive import share_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config

MICRO_BATCHES = 4


class Place(SimpleNamespace):
    """Where rank ``rank`` meets something: a context around its step, which is given its model and micro-batches."""

    rank: int
    spoil: Callable[[Any, list[Batch]], AbstractContextManager[Any]]


def nan_loss(model: Any, batches: list[Batch]) -> AbstractContextManager[Any]:
    batches[1]["loss_mask"][0, 3] = math.nan
    return nullcontext()


def nan_entropy(layer: int) -> Callable[[Any, list[Batch]], AbstractContextManager[Any]]:
    def spoil(model: Any, batches: list[Batch]) -> AbstractContextManager[Any]:
        store = model.meter.store

        def spoiled(number: int, index: int, entropy: Tensor, heads: Tensor | None = None) -> None:
            assert number in (0, 1, 2, 3)
            store(number, index, entropy * math.nan if number == layer else entropy, heads)

        return mock.patch.object(model.meter, "store", spoiled)

    return spoil


def infinite_gradient(name: str) -> Callable[[Any, list[Batch]], AbstractContextManager[Any]]:
    def spoil(model: Any, batches: list[Batch]) -> AbstractContextManager[Any]:
        parameter = dict(model.named_parameters())[name]
        return Removed(parameter.register_hook(lambda grad: torch.full_like(grad, math.inf)))

    return spoil


def infinite_hidden_state(model: Any, batches: list[Batch]) -> AbstractContextManager[Any]:
    """One element of what the last layer of the stage hands on."""

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        hidden = output[0].clone()
        hidden[0, 0, 0] = math.inf
        return (hidden, *output[1:])

    layer = model.chunks[0].decoder.layers[-1]
    return Removed(layer.register_forward_hook(spoil))


class Removed(AbstractContextManager[None]):
    """Removes a handle at its end."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


TENSOR = {
    "loss": Place(rank=3, spoil=nan_loss),
    "entropy, first stage": Place(rank=1, spoil=nan_entropy(1)),
    "entropy, last stage": Place(rank=2, spoil=nan_entropy(2)),
    "hidden state": Place(rank=0, spoil=infinite_hidden_state),
    "copy of a replicated weight, first stage": Place(
        rank=1, spoil=infinite_gradient("gpt.decoder.layers.0.input_layernorm.weight")
    ),
    "copy of a replicated weight, last stage": Place(
        rank=3, spoil=infinite_gradient("gpt.decoder.final_layernorm.weight")
    ),
    "sharded weight": Place(rank=3, spoil=infinite_gradient("gpt.decoder.layers.2.self_attention.linear_qkv.weight")),
    "tied weight": Place(rank=1, spoil=infinite_gradient("gpt.embedding.word_embeddings.weight")),
}
"""PP2 x TP2: ranks 0 and 1 hold layers 0 and 1."""
STAGES = {
    "loss": Place(rank=3, spoil=nan_loss),
    **{f"entropy, stage {stage}": Place(rank=stage, spoil=nan_entropy(stage)) for stage in range(4)},
    "weight of a middle stage": Place(rank=1, spoil=infinite_gradient("gpt.decoder.layers.1.mlp.linear_fc1.weight")),
    "hidden state": Place(rank=2, spoil=infinite_hidden_state),
}
"""PP4: a layer each."""
REPLICAS = {
    "loss": Place(rank=2, spoil=nan_loss),
    "entropy, first stage": Place(rank=1, spoil=nan_entropy(0)),
    "weight of one replica": Place(rank=3, spoil=infinite_gradient("gpt.decoder.layers.3.mlp.linear_fc2.weight")),
    "hidden state": Place(rank=0, spoil=infinite_hidden_state),
}
"""PP2 x DP2."""
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Place]]] = {
    "pp2_tp2": ({"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2}, TENSOR),
    "pp4": ({"pipeline_model_parallel_size": 4}, STAGES),
    "pp2_dp2": ({"pipeline_model_parallel_size": 2}, REPLICAS),
    "pp2_vp2_dp2": ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, REPLICAS),
}


class Run:
    """An engine, and steps on random tokens."""

    def __init__(self, info: RankInfo, parallel: dict[str, Any], zero: int, precision: str) -> None:
        shared = parallel.get("tensor_model_parallel_size", 1) * parallel["pipeline_model_parallel_size"]
        self.config = small_config(
            model={"untie_embeddings_and_output_weights": False},
            optim={"weight_decay": 0.0, "clip_grad": 1.0},
            parallel={**parallel, "zero_stage": zero},
            deepspeed={"zero_optimization": {"stage": zero}},
            train={"global_batch_size": 2 * MICRO_BATCHES * info.world_size // shared, "precision": precision},
        )
        self.groups: ParallelGroups = start_processes(self.config, info)
        self.runtime: Runtime = build_runtime(self.config, self.groups)
        self.runtime.engine.train()
        self.runtime.model.meter.enabled = True
        self.steps = 0

    def take(self, place: Place | None = None) -> StepResult:
        self.steps += 1
        first = 1000 * self.steps + 10 * self.groups.dp_rank
        batches = [random_batch(self.config, seed=first + number) for number in range(MICRO_BATCHES)]
        here = place is not None and place.rank == self.groups.rank
        with place.spoil(self.runtime.model, batches) if place is not None and here else nullcontext():
            result = train_step(self.runtime.engine, batches, 1e-2, 1.0, self.groups)
        self.runtime.model.meter.reset()
        return result

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.runtime.model.named_parameters()}

    def moments(self) -> list[Tensor]:
        found: list[Tensor] = []
        _collect_tensors(self.runtime.engine.optimizer.state_dict(), found)
        return [tensor.clone() for tensor in found]


def spoil_in_turn(info: RankInfo, layout: str, cases: list[tuple[int, str]]) -> dict[str, Any]:
    """A good step, then for every place a spoiled one and a good one: (applied, untouched, moved) of each."""
    parallel, places = LAYOUTS[layout]
    found: dict[str, Any] = {}
    for zero, precision in cases:
        run = Run(info, parallel, zero, precision)
        assert run.take().applied
        for name, place in places.items():
            before = run.weights(), run.moments()
            spoiled = run.take(place)
            after = run.weights(), run.moments()
            good = run.take()
            found[f"ZeRO-{zero} {precision}: {name}"] = {
                "applied": (spoiled.applied, good.applied),
                "finite norms": (math.isfinite(spoiled.grad_norm), math.isfinite(good.grad_norm)),
                "untouched": same(before[0], after[0]) and same(before[1], after[1]),
                "moved": not same(after[0], run.weights()),
            }
        verify_replicas(run.runtime.model, run.steps, zero, run.groups)
    return found


FEW, REST = [(0, "fp32"), (2, "fp32"), (1, "bf16")], [(1, "fp32"), (2, "bf16")]
EVERY = [(layout, cases) for layout in LAYOUTS for cases in (FEW, REST)]
SHARE = [EVERY[0]]


@pytest.mark.parametrize(("layout", "cases"), share_of(EVERY, SHARE))
def test_the_step_is_skipped_on_all_ranks(layout: str, cases: list[tuple[int, str]]) -> None:
    results = run_on_ranks(4, spoil_in_turn, layout, cases, backend="gloo", timeout=300)
    expected = {"applied": (False, True), "finite norms": (False, True), "untouched": True, "moved": True}
    wrong = {
        f"rank {rank}, {where}": seen
        for rank, result in enumerate(results)
        for where, seen in result.items()
        if seen != expected
    }
    assert wrong == {}
    assert len(results[0]) == len(cases) * len(LAYOUTS[layout][1])
