"""Steps of a pipeline of two stages against the same steps of one process: tied weights, ZeRO, bf16, pieces, NaNs."""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgt.arch.weights import weights
from megatron_sgt.compat.release import release_engine
from megatron_sgt.config import Config
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.step import train_step
from megatron_sgt.evaluation.perplexity import mean_loss
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.model.entropy_meter import EntropyMeter
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config

LOOPS = LoopPlan(4, ((1, LayerPlan(1, (0, 3))), (3, LayerPlan(2, (1, 2), 0.5))))
CASES: dict[str, dict[str, Any]] = {
    "tied, ZeRO 0": {"tied": True, "zero": 0},
    "tied, ZeRO 2, recomputed": {"tied": True, "zero": 2, "recompute": "full"},
    "bf16, BF16_Optimizer": {"zero": 1, "precision": "bf16"},
    "tied bf16": {"tied": True, "zero": 2, "precision": "bf16"},
}
MICRO_BATCHES = 3


def config_of(case: dict[str, Any], stages: int) -> Config:
    return small_config(
        model={"untie_embeddings_and_output_weights": not case.get("tied", False), "init_method_std": 0.1},
        optim={"clip_grad": 0.5, "adam_eps": 1e-4},
        parallel={
            "pipeline_model_parallel_size": stages,
            "pipeline_model_parallel_layout": "1,3" if stages == 2 else "auto",
            "zero_stage": case["zero"],
        },
        deepspeed={"zero_optimization": {"stage": case["zero"]}},
        train={
            "global_batch_size": 2 * MICRO_BATCHES,
            "precision": case.get("precision", "fp32"),
            "recompute_granularity": case.get("recompute", "none"),
        },
    )


@contextlib.contextmanager
def nan_entropies(meter: EntropyMeter) -> Iterator[None]:
    """Inside, the entropies of layer 0, which the first stage holds, are NaN."""
    store = meter.store

    def spoiled(layer: int, index: int, entropy: Tensor, heads: Tensor | None = None) -> None:
        store(layer, index, entropy * math.nan if layer == 0 else entropy, heads)

    meter.store = spoiled  # type: ignore[method-assign]
    yield
    meter.store = store  # type: ignore[method-assign]


def steps_of(info: RankInfo, stages: int) -> dict[str, dict[str, Any]]:
    """Of every case: what five steps measure, two of them spoiled, and the model after them."""
    found: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        config = config_of(case, stages)
        groups = start_processes(config, info)
        runtime = build_runtime(config, groups)
        engine, model = runtime.engine, runtime.model
        names = [name for name, _ in model.gpt.named_parameters()]
        apply_plan(model, LOOPS)
        engine.train()
        model.meter.enabled = True
        results, table = [], None
        for step in range(5):
            batches = [random_batch(config, seed=10 * step + m) for m in range(MICRO_BATCHES)]
            if step == 1:
                batches[0]["loss_mask"][0, 3] = math.nan
            with nan_entropies(model.meter) if step == 3 else contextlib.nullcontext():
                results.append(train_step(engine, batches, 1e-2, 0.5, groups, pieces=2 if step == 2 else 1))
            if step == 0:
                table = torch.from_numpy(model.meter.reduce(groups))
            model.meter.reset()
        held_out = [random_batch(config, seed=90 + m) for m in range(2)]
        found[name] = {
            "names": names,
            "loss": [float(result.loss) for result in results],
            "norm": [result.grad_norm for result in results],
            "applied": [result.applied for result in results],
            "entropies": table,
            "valid": mean_loss(engine, held_out, groups),
            "mode": {module.training for chunk in model.chunks for module in chunk.modules()},
            "logits": model.logits(held_out[0]["tokens"]).float(),
            "kept": [chunk.decoder.input_tensor for chunk in model.chunks],
            "weights": {name: tensor.float() for name, tensor in model.gpt.state_dict().items()},
        }
        alive = weakref.ref(engine), weakref.ref(model), weakref.ref(model.chunks[0])
        release_engine(engine)
        del engine, runtime, model
        gc.collect()
        found[name]["freed"] = all(one() is None for one in alive)
    return found


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, Any]]:
    return run_on_ranks(1, steps_of, 1)[0]


@pytest.fixture(scope="module")
def stages() -> list[dict[str, dict[str, Any]]]:
    return run_on_ranks(2, steps_of, 2, backend="gloo")


@pytest.mark.parametrize("case", CASES)
def test_steps_of_a_pipeline(case: str, whole: dict[str, Any], stages: list[dict[str, Any]]) -> None:
    expected, half = whole[case], "precision" in CASES[case]
    tolerance = 2e-3 if half else 2e-6
    for found in (stage[case] for stage in stages):
        assert found["applied"] == expected["applied"] == [True, False, True, False, True]
        for step in (0, 2, 4):
            assert found["loss"][step] == pytest.approx(expected["loss"][step], abs=tolerance)
            assert found["norm"][step] == pytest.approx(expected["norm"][step], rel=1e-2 if half else 1e-5)
        assert not any(math.isfinite(found["norm"][step]) for step in (1, 3))
        assert gap(found["entropies"], expected["entropies"]) <= tolerance
        assert found["valid"] == pytest.approx(expected["valid"], abs=tolerance)
        assert gap(found["logits"], expected["logits"]) <= (0.1 if half else 2e-5)
        assert found["mode"] == {True} and found["freed"]
        assert found["kept"] == [None], "an evaluation's last input is no longer needed"
    assert stages[0][case]["loss"][4] == stages[1][case]["loss"][4]


@pytest.mark.parametrize("case", CASES)
def test_the_stages_hold_the_model_once(case: str, whole: dict[str, Any], stages: list[dict[str, Any]]) -> None:
    """Under the names of a model of one piece, in its order; a tied weight belongs to the first stage."""
    names = [name for stage in stages for name in stage[case]["names"]]
    config = config_of(CASES[case], 2)
    assert sorted(names) == sorted(weight.megatron for weight in weights(config.model))
    assert names == whole[case]["names"]
    merged = stages[0][case]["weights"] | stages[1][case]["weights"]
    assert merged.keys() == whole[case]["weights"].keys()
    worst = max(gap(tensor, whole[case]["weights"][name]) for name, tensor in merged.items())
    assert worst <= (2e-2 if "precision" in CASES[case] else 2e-5)


def gap(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())
