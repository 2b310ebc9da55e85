"""What the stages of a pipeline hold: sums of what their layers, ends and micro-batches in flight take."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sgt.arch.kernels import CPU, GPU
from megatron_sgt.config import Config
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.pipeline import _Passes
from megatron_sgt.engine.step import train_step
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.planning.in_flight import most_in_flight
from megatron_sgt.planning.memory import Shape, activation_memory
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.planning.rank_memory import peak_memory, rank_memory, stage_activations
from megatron_sgt.planning.state_memory import state_memory
from tests.helpers.live_memory import LiveMemory
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config


def piped(stages: int, virtual: int = 1, micro_batches: int = 8, **sections: dict[str, Any]) -> Config:
    """Eight layers on ``stages`` ranks."""
    parallel = {
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": virtual,
        "pipeline_model_parallel_layout": ",".join(["1"] * (stages * virtual - 1) + [str(9 - stages * virtual)])
        if stages > 1
        else "auto",
    }
    return small_config(
        model={"num_layers": 8, **sections.get("model", {})},
        parallel={**parallel, **sections.get("parallel", {})},
        train={"global_batch_size": 2 * micro_batches, **sections.get("train", {})},
    )


LOOPS = LoopPlan(8, ((6, LayerPlan(2, (0, 1))), (7, LayerPlan(1, (3,)))))


def test_without_a_pipeline_a_rank_holds_the_model_and_one_micro_batch() -> None:
    config = piped(1)
    (rank,) = rank_memory(config, LOOPS, 1, "bf16")
    state, activations = state_memory(config, 1, "bf16"), activation_memory(config, LOOPS, "bf16")
    assert (rank.stage, rank.in_flight, rank.state, rank.activations) == (0, 1, state, activations)
    assert peak_memory(config, [LoopPlan.empty(8), LOOPS], 1, "bf16") == rank.total == sum(rank.rows().values()) // 2


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_stages_share_the_model_and_keep_as_many_micro_batches_as_they_have_in_flight(recompute: str) -> None:
    """Layers 1, 1, 1 and 5; loops on the last stage, where one micro-batch is in flight, logits there alone."""
    train = {"recompute_granularity": recompute}
    whole = activation_memory(piped(1, train=train), LOOPS, "bf16")
    ranks = rank_memory(piped(4, train=train), LOOPS, 4, "bf16")
    assert [rank.in_flight for rank in ranks] == [4, 3, 2, 1]
    assert [rank.activations.layers * 8 // whole.layers for rank in ranks] == [4, 3, 2, 5]
    assert [rank.activations.loops for rank in ranks] == [0, 0, 0, whole.loops]
    assert [rank.activations.logits for rank in ranks] == [0, 0, 0, whole.logits]
    assert sum(rank.state.weights for rank in ranks) == 2 * parameter_count(piped(1).model)


def test_interleaved_stages_keep_each_chunk_as_often_as_it_is_in_flight() -> None:
    """Layers of stage 0: chunks of 1 and 1; 2(4-0-1) + 4 + 1 = 11 chunks of one layer each, and their outputs."""
    config = piped(4, 2)
    whole = activation_memory(piped(1), LOOPS, "bf16")
    first, *_, last = (stage_activations(config, LOOPS, "bf16", stage, 8) for stage in range(4))
    stream = Shape.of(config, "bf16", GPU).stream
    assert first.layers == 11 * (whole.layers // 8 + stream)
    # Of its 5 chunks one is the last, which keeps no output.
    assert (last.layers, last.logits) == (5 * whole.layers // 8 + 4 * stream, whole.logits)


def test_a_tied_weight_is_the_first_stages_and_the_last_one_has_a_copy_and_a_gradient() -> None:
    tied = {"untie_embeddings_and_output_weights": False}
    config = piped(4, model=tied)
    first, *_, last = (state_memory(config, 4, "bf16", stage) for stage in range(4))
    embedding = config.model.padded_vocab_size() * 64
    assert (first.borrowed, last.borrowed) == (0, (2 + 4) * embedding)
    assert (
        last.borrowed
        == 2 * state_memory(piped(2, model=tied, parallel={"tensor_model_parallel_size": 2}), 4, "bf16", 1).borrowed
    )
    assert state_memory(piped(4), 4, "bf16", 3).borrowed == 0
    assert sum(state_memory(config, 4, "bf16", s).weights for s in range(4)) == 2 * parameter_count(config.model)


def test_an_average_of_the_weights_is_each_stages_own() -> None:
    train = {"ema_decay": 0.9}
    averages = [state_memory(piped(4, train=train), 4, "bf16", stage).average for stage in range(4)]
    assert sum(averages) == pytest.approx(4 * parameter_count(piped(1).model), abs=4 * 4 * 2)
    assert averages[1] == averages[2] < averages[3]


def real(virtual: int) -> Config:
    """Two stages that run on CPUs."""
    model = {"seq_length": 64, "num_attention_heads": 8}
    return piped(2, virtual, 4, model=model, train={"global_batch_size": 8})


def kept_by_stage(info: RankInfo, virtual: int) -> tuple[int, int]:
    """(most micro-batches in flight, most bytes of activations when a backward pass begins) of a real step."""
    config = real(virtual)
    groups = start_processes(config, info)
    runtime = build_runtime(config, groups)
    batches = [random_batch(config, seed) for seed in range(4)]
    train_step(runtime.engine, batches, 1e-3, 1.0, groups)
    seen: list[tuple[int, int]] = []
    backward_of = _Passes.backward

    def backward(self: Any, output: Any, gradient: Any) -> None:
        seen.append((len(self._in_flight), memory.live()))
        backward_of(self, output, gradient)

    with LiveMemory() as memory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Passes, "backward", backward)
        train_step(runtime.engine, batches, 1e-3, 1.0, groups)
    return max(number for number, _ in seen), max(size for _, size in seen[:1])


@pytest.mark.parametrize("virtual", [1, 2])
def test_two_real_stages_hold_what_the_formula_says(virtual: int) -> None:
    """At the first backward pass, when nothing but activations (and what is received) was made in the step."""
    config = real(virtual)
    for stage, (in_flight, live) in enumerate(run_on_ranks(2, kept_by_stage, virtual, backend="gloo")):
        formula = stage_activations(config, LoopPlan.empty(8), "fp32", stage, 4, CPU, 0)
        assert in_flight == most_in_flight(2, virtual, stage, 4)
        received = stage == 0 or virtual > 1  # a gradient; on the last stage the next input
        assert formula.saved + received * 2 * 64 * 64 * 4 == pytest.approx(live, rel=0.01)
