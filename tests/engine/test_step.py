"""One optimizer step: accumulation, clipping, and what a gradient that is not finite must not touch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgt.config import Config
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.step import Batch, StepResult, TrainState, train_step
from megatron_sgt.errors import CheckpointError
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config

LR = 1e-2
MICRO_BATCHES = 2


class Steps:
    """An engine on this rank, and its steps on random tokens (others on every data-parallel rank)."""

    def __init__(
        self, info: RankInfo, tensor: int, zero: int, clip: float, precision: str = "fp32", eps: float = 1e-8
    ) -> None:
        replicas = info.world_size // tensor
        self.config: Config = small_config(
            optim={"adam_eps": eps, "weight_decay": 0.0, "clip_grad": clip},
            parallel={"tensor_model_parallel_size": tensor, "zero_stage": zero},
            deepspeed={"zero_optimization": {"stage": zero}},  # ZeRO on one data-parallel rank, too
            train={"global_batch_size": 2 * MICRO_BATCHES * replicas, "precision": precision},
        )
        self.clip = clip
        self.groups = start_processes(self.config, info)
        self.runtime = build_runtime(self.config, self.groups)
        self.engine = self.runtime.engine
        self.engine.train()

    def batches(self, step: int) -> list[Batch]:
        first = 1000 * step + 10 * self.groups.dp_rank
        return [random_batch(self.config, seed=first + m) for m in range(MICRO_BATCHES)]

    def take(self, step: int, spoil: Callable[[list[Batch]], None] = lambda batches: None) -> StepResult:
        batches = self.batches(step)
        spoil(batches)
        return train_step(self.engine, batches, LR, self.clip, self.groups)

    def weights(self) -> dict[str, Tensor]:
        """By name; under ZeRO-3 this rank's part of each."""
        named = self.runtime.model.named_parameters()
        return {name: getattr(p, "ds_tensor", p).detach().clone() for name, p in named}

    def moments(self) -> list[Tensor]:
        states = self.engine.optimizer.state_dict()
        found: list[Tensor] = []
        _collect_tensors(states, found)
        return [tensor.clone() for tensor in found]


def _collect_tensors(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, dict):
        for item in value.values():
            _collect_tensors(item, found)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect_tensors(item, found)


def same(one: Any, other: Any) -> bool:
    pairs = zip(one.values(), other.values(), strict=True) if isinstance(one, dict) else zip(one, other, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def nan_entropy(model: Any) -> Any:
    """Let every entropy of layer 1 that is measured be NaN."""
    store = model.meter.store

    def spoiled(layer: int, index: int, entropy: Tensor, heads: Tensor | None = None) -> None:
        store(layer, index, entropy * math.nan if layer == 1 else entropy, heads)

    model.meter.store = spoiled
    return SimpleNamespace(remove=lambda: setattr(model.meter, "store", store))


def infinite_loss(model: Any) -> Any:
    """Let the loss be infinite while its gradient stays finite."""
    return model.register_forward_hook(lambda module, arguments, loss: loss + math.inf)


def infinite_gradient(name: str) -> Callable[[Any], Any]:
    return lambda model: dict(model.named_parameters())[name].register_hook(
        lambda grad: torch.full_like(grad, math.inf)
    )


PLACES: dict[str, Callable[[Any], Any] | None] = {
    "loss": None,
    "loss value": infinite_loss,
    "entropy": nan_entropy,
    "replicated": infinite_gradient("gpt.decoder.final_layernorm.weight"),
    "sharded": infinite_gradient("gpt.decoder.layers.1.self_attention.linear_qkv.weight"),
}


def spoil_one_rank(info: RankInfo, tensor: int, zero: int, where: str, precision: str) -> dict[str, Any]:
    """Two good steps around one in which a single rank meets a NaN."""
    steps = Steps(info, tensor, zero, clip=1.0, precision=precision)
    groups = steps.groups

    def nan_in_loss(batches: list[Batch]) -> None:
        if groups.dp_rank == groups.dp_size - 1:
            batches[0]["loss_mask"][0, 3] = math.nan

    steps.runtime.model.meter.enabled = True
    first = steps.take(0)
    before = steps.weights(), steps.moments()
    handles, spoil = [], PLACES[where]
    if spoil is not None and groups.rank == groups.world_size - 1:
        handles.append(spoil(steps.runtime.model))
    spoiled = steps.take(1, nan_in_loss if where == "loss" else lambda batches: None)
    after = steps.weights(), steps.moments()
    for handle in handles:
        handle.remove()
    last = steps.take(2)
    weights = steps.weights()
    return {
        "applied": (first.applied, spoiled.applied, last.applied),
        "untouched": (same(before[0], after[0]), same(before[1], after[1])),
        "norms": (first.grad_norm, spoiled.grad_norm, last.grad_norm),
        "moved": not same(after[0], weights),
        "finite": all(bool(w.isfinite().all()) for w in weights.values()),
        "norm weight": weights["gpt.decoder.final_layernorm.weight"],
    }


@pytest.mark.parametrize(
    ("world_size", "tensor", "zero", "place", "precision"),
    [
        (2, 1, 0, "loss", "fp32"),
        (2, 1, 1, "loss", "fp32"),
        (2, 1, 2, "loss", "fp32"),
        (2, 1, 3, "loss", "fp32"),
        (2, 1, 1, "loss", "bf16"),
        (2, 1, 3, "loss", "bf16"),
        (2, 1, 0, "loss value", "fp32"),
        (2, 1, 1, "entropy", "fp32"),
        (2, 2, 2, "entropy", "bf16"),
        (2, 2, 3, "loss value", "fp32"),
        (2, 1, 0, "replicated", "fp32"),
        (2, 1, 2, "sharded", "fp32"),
        (2, 2, 0, "replicated", "fp32"),
        (2, 2, 0, "sharded", "fp32"),
        (2, 2, 1, "replicated", "fp32"),
        (4, 2, 2, "sharded", "fp32"),
        (2, 2, 1, "replicated", "bf16"),
        (4, 2, 1, "sharded", "bf16"),
        (2, 2, 2, "replicated", "bf16"),
        (2, 2, 3, "replicated", "bf16"),
        (2, 2, 3, "replicated", "fp32"),
    ],
)
def test_one_ranks_nan_skips_the_step_on_all(
    world_size: int, tensor: int, zero: int, place: str, precision: str
) -> None:
    results = run_on_ranks(world_size, spoil_one_rank, tensor, zero, place, precision)
    for rank, result in enumerate(results):
        assert result["applied"] == (True, False, True), rank
        assert result["untouched"] == (True, True), f"rank {rank}: weights, optimizer state: {result}"
        assert [math.isfinite(norm) for norm in result["norms"]] == [True, False, True], rank
        assert result["moved"] and result["finite"], rank
        if zero < 3 or rank < tensor:  # under ZeRO-3 other replicas hold other parts
            assert torch.equal(result["norm weight"], results[0]["norm weight"]), rank


def good_step(info: RankInfo, tensor: int, zero: int, clip: float) -> dict[str, Any]:
    steps = Steps(info, tensor, zero, clip)
    counted = []
    meter = steps.runtime.model.meter
    meter.end_micro_batch = lambda *_: counted.append(1)  # type: ignore[method-assign]
    before = steps.weights()
    result = steps.take(0)
    step = {name: weight - before[name] for name, weight in steps.weights().items()}
    rates = {group["lr"] for group in steps.engine.optimizer.param_groups}
    return {"result": result, "counted": len(counted), "rates": rates, "step": step}


def reference_step(dp_size: int) -> tuple[float, float]:
    """(loss, gradient norm) of the same step by plain autograd on the whole global batch in one process."""
    [(loss, norm)] = run_on_ranks(1, whole_batch, dp_size)
    return loss, norm


def whole_batch(info: RankInfo, dp_size: int) -> tuple[float, float]:
    steps = Steps(info, 1, 1, clip=0.0)
    model = steps.runtime.model
    losses = []
    for replica in range(dp_size):
        for m in range(MICRO_BATCHES):
            losses.append(model(**random_batch(steps.config, seed=10 * replica + m)))
    loss = torch.stack(losses).mean()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss), math.sqrt(sum(float(g.double().square().sum()) for g in grads))


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("tensor", [1, 2])
def test_step_is_that_of_the_whole_batch(tensor: int, zero: int) -> None:
    results = run_on_ranks(2, good_step, tensor, zero, 0.0)
    loss, norm = reference_step(2 // tensor)
    measured = sum(float(r["result"].loss) for r in results) / 2
    assert measured == pytest.approx(loss, abs=2e-6)
    for result in results:
        assert result["result"].grad_norm == pytest.approx(norm, rel=1e-5)
        assert result["result"].applied and result["result"].seconds > 0
        assert result["counted"] == MICRO_BATCHES
        assert result["rates"] == {LR} and result["result"].lr == LR


def clipped_step(info: RankInfo, zero: int, clip: float) -> tuple[float, Tensor]:
    """The norm, and by how much a step moves the output layer when AdamW's epsilon is 1."""
    steps = Steps(info, 2, zero, clip, eps=1.0)
    name = "gpt.output_layer.weight"
    before = steps.weights()[name]
    norm = steps.take(0).grad_norm
    return norm, steps.weights()[name] - before


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_the_whole_gradient_is_clipped(zero: int) -> None:
    clip = 0.05
    free, clipped = (run_on_ranks(2, clipped_step, zero, limit) for limit in (0.0, clip))
    for (norm, step), (measured, clipped_by) in zip(free, clipped, strict=True):
        assert norm > 2 * clip, "nothing would be clipped"
        assert measured == pytest.approx(norm, rel=1e-6), "the norm is the one before clipping"
        # AdamW's first step is -lr g / (|g| + epsilon): solve for g, clip it, and predict the step.
        share = step.abs() / LR
        gradient = -step.sign() * share / (1 - share) * clip / norm
        expected = -LR * gradient / (gradient.abs() + 1)
        assert expected.abs().max() > 1e-6
        assert torch.allclose(clipped_by, expected, rtol=1e-2, atol=1e-8)


FIELDS = ("step", "consumed_samples", "skipped_steps", "consecutive_skipped")


def test_a_run_begins_at_zero() -> None:
    assert TrainState().state_dict() == dict.fromkeys(FIELDS, 0)


def test_round_trip_through_json() -> None:
    state = TrainState(7, 224, 3, 1)
    loaded = TrainState()
    loaded.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert loaded == state


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_counter_is_named(name: str) -> None:
    saved = TrainState(7, 224, 3, 1).state_dict()
    del saved[name]
    with pytest.raises(CheckpointError, match=f"the checkpoint's training state has no '{name}'"):
        TrainState().load_state_dict(saved)


def test_counters_of_a_later_version_are_ignored() -> None:
    state = TrainState()
    state.load_state_dict({**TrainState(7, 224, 3, 1).state_dict(), "epoch": 2})
    assert state == TrainState(7, 224, 3, 1)
