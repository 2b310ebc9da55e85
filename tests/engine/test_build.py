"""A runtime from a configuration: device, precision, given weights, and what is refused."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.step import train_step
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.layer import SGTLayer
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config


def describe(info: RankInfo, sections: dict[str, Any]) -> dict[str, Any]:
    config = small_config(**sections)
    groups = start_processes(config, info)
    runtime = build_runtime(config, groups)
    engine = runtime.engine
    return {
        "place": (groups.rank, groups.tp_rank, groups.tp_size, groups.dp_rank, groups.dp_size),
        "device": str(groups.device),
        "threads": torch.get_num_threads(),
        "precision": runtime.precision,
        "types": {p.dtype for p in runtime.model.parameters()},
        "stage": engine.zero_optimization_stage(),
        "accumulation": engine.gradient_accumulation_steps(),
        "environment": {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    }


def test_places_and_environment() -> None:
    sections = {
        "parallel": {"tensor_model_parallel_size": 2, "zero_stage": 2},
        "train": {"global_batch_size": 8},
    }
    results = run_on_ranks(4, describe, sections)
    assert [r["place"] for r in results] == [
        (0, 0, 2, 0, 2),
        (1, 1, 2, 0, 2),
        (2, 0, 2, 1, 2),
        (3, 1, 2, 1, 2),
    ]
    for rank, result in enumerate(results):
        assert (result["device"], result["threads"]) == ("cpu", 1)
        assert (result["precision"], result["types"]) == ("fp32", {torch.float32})
        assert (result["stage"], result["accumulation"]) == (2, 2)
        assert result["environment"] == {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank)}


def test_bf16() -> None:
    [result] = run_on_ranks(1, describe, {"train": {"precision": "bf16"}})
    assert (result["precision"], result["types"]) == ("bf16", {torch.bfloat16})


@pytest.mark.parametrize("world_size", [1, 2])
def test_fp16_is_refused_on_a_cpu_in_words(world_size: int) -> None:
    with pytest.raises(ConfigError, match=r"train\.precision: fp16 needs a GPU"):
        run_on_ranks(world_size, describe, {"train": {"precision": "fp16", "global_batch_size": 4}})


def from_weights(info: RankInfo, zero: int, precision: str, spoil: str) -> dict[str, Any]:
    """Build from the weights of another model, take a step with learning rate 0, and look at what is there."""
    config = small_config(
        parallel={"zero_stage": zero},
        train={"precision": precision, "seed": 1},
        deepspeed={"zero_optimization": {"stage": zero}},
    )
    groups = start_processes(config, info)
    other = small_config(train={"seed": 2})
    names = donor_weights(build_runtime(other, groups))
    if spoil == "missing":
        del names["model.norm.weight"]
    elif spoil == "unknown":
        names["model.norm.bias"] = torch.zeros(64)
    runtime = build_runtime(config, groups, weights=names)
    runtime.engine.train()
    train_step(runtime.engine, [random_batch(config)], 0.0, 1.0, groups)
    after = donor_weights(runtime)
    return {name: float((after[name].float() - names[name]).abs().max()) for name in names}


def donor_weights(runtime: Any) -> dict[str, torch.Tensor]:
    from trajectory_parts.run import gather_hf_weights

    return gather_hf_weights(runtime, small_config())


@pytest.mark.parametrize(("zero", "precision", "noise"), [(0, "fp32", 0.0), (1, "fp32", 0.0), (2, "bf16", 4e-3)])
def test_given_weights_reach_the_optimizers_copy(zero: int, precision: str, noise: float) -> None:
    """A step writes the optimizer's copy back to the model: it must be made of the given weights."""
    [differences] = run_on_ranks(1, from_weights, zero, precision, "")
    assert len(differences) > 10
    assert max(differences.values()) <= noise


@pytest.mark.parametrize(
    ("spoil", "message"),
    [("missing", r"lack .*model\.norm\.weight"), ("unknown", r"unknown .*model\.norm\.bias")],
)
def test_weights_of_another_model_are_refused(spoil: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        run_on_ranks(1, from_weights, 1, "fp32", spoil)


def layer_types(info: RankInfo, plain: bool) -> set[str]:
    config = small_config()
    runtime = build_runtime(config, start_processes(config, info), plain=plain)
    return {type(m).__name__ for m in runtime.model.modules() if "TransformerLayer" in str(type(m).__mro__)}


@pytest.mark.parametrize(("plain", "name"), [(False, SGTLayer.__name__), (True, "TransformerLayer")])
def test_plain_means_megatrons_own_layers(plain: bool, name: str) -> None:
    assert run_on_ranks(1, layer_types, plain) == [{name}]
