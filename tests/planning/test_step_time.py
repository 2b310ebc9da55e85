"""The time model: each component by hand on a simple case, and the orders that must hold."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest

from megatron_sgt.config import Config
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.planning.flops import step_flops
from megatron_sgt.planning.hardware import find_gpu
from megatron_sgt.planning.layer_cost import output_cost
from megatron_sgt.planning.memory import activation_memory
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.planning.pipeline import bubble, pipeline_layout
from megatron_sgt.planning.state_memory import state_memory
from megatron_sgt.planning.step_time import OPTIMIZER_BYTES, Machine, step_time
from tests.helpers.single import small_config

MACHINE = Machine(find_gpu("h100"), kernel_efficiency=0.5, link_efficiency=0.5, latency=0.0)
VANILLA = LoopPlan.empty(4)
GROWN = LoopPlan(4, ((3, LayerPlan(2, (0, 1))),))
TWO: dict[str, Any] = {"parallel": {"pipeline_model_parallel_size": 2}}
RATE = 0.5 * 989.4e12


def config(tp: int = 1, **sections: dict[str, Any]) -> Config:
    """A 7B-like layer, four times."""
    model = {"hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 11008, "seq_length": 4096}
    return small_config(
        model={**model, "vocab_size": 32000},
        parallel={
            "tensor_model_parallel_size": tp,
            "sequence_parallel": tp > 1,
            **sections.get("parallel", {}),
        },
        train={"micro_batch_size": 1, "global_batch_size": 16, **sections.get("train", {})},
    )


def test_one_gpu_is_arithmetic_memory_and_the_optimizer() -> None:
    cfg = config()
    flops = step_flops(cfg.model, VANILLA, 16)
    time = step_time(cfg, VANILLA, 1, MACHINE, "bf16", "owner")
    assert time.compute == pytest.approx((3 * flops.linear + 1.75 * flops.attention) / (0.5 * 989.4e12))
    kept = activation_memory(cfg, VANILLA, "bf16").saved
    assert time.elementwise == pytest.approx(16 * 5 * kept / 3.35e12)
    assert time.optimizer == pytest.approx(OPTIMIZER_BYTES * parameter_count(cfg.model) / 3.35e12)
    assert (time.tensor_parallel, time.data_parallel, time.loops) == (0, 0, 0)
    assert time.total == pytest.approx(time.compute + time.elementwise + time.optimizer)


def test_gradients_over_two_nodes_pass_the_network() -> None:
    """One rank of every node has the node's eight adapters at most, two ranks in a node have them all."""
    cfg = config(tp=8)
    inside, outside = (step_time(config(tp=tp), VANILLA, 16, MACHINE, "bf16", "owner").data_parallel for tp in (1, 8))
    element = 2 * 4 + 2  # bytes: the all-reduce of fp32 gradients counts twice, and the all-gather of bf16 weights
    payload = element * parameter_count(cfg.model, 8)
    assert outside == pytest.approx(payload * (1 / 2) / (0.5 * 50e9))
    assert inside == pytest.approx(element * parameter_count(cfg.model) * (15 / 16) / (0.5 * 400e9))


def test_latency_counts_per_call() -> None:
    slow = replace(MACHINE, latency=1.0)
    cfg = config(tp=4)
    quick, late = (step_time(cfg, VANILLA, 4, m, "bf16", "owner").tensor_parallel for m in (MACHINE, slow))
    # Per layer 4 + 6 collectives and 2 norm gradients; embedding 2, output 1 + 3, loss 3; 16 micro-batches.
    calls = 16 * (4 * 12 + 2 + 4 + 3)
    assert late - quick == pytest.approx(calls * math.log2(4))


def test_balanced_loops_cost_less_than_naive_ones_and_both_little() -> None:
    cfg = config(tp=8)
    naive, balanced = (step_time(cfg, GROWN, 8, MACHINE, "bf16", way) for way in ("owner", "balanced"))
    assert 0 < 4 * balanced.loops < naive.loops < naive.total / 5
    assert replace(naive, loop_compute=0, loop_traffic=0) == replace(balanced, loop_compute=0, loop_traffic=0)


@pytest.mark.parametrize(("granularity", "more"), [("selective", 1.0), ("full", 1.25)])
def test_recompute_adds_its_forward(granularity: str, more: float) -> None:
    plain, again = (
        step_time(config(train={"recompute_granularity": g}), GROWN, 1, MACHINE, "bf16", "owner")
        for g in ("none", granularity)
    )
    assert again.compute > plain.compute * more
    assert again.compute < plain.compute * 4 / 3
    assert (again.loop_compute > plain.loop_compute) is (granularity == "full")


def test_window_and_block_loops_cost_their_share_of_a_layer() -> None:
    cfg = config()
    window = LoopPlan(4, ((3, LayerPlan(1, (0, 1), 0.5)),))
    block = LoopPlan(4, ((3, LayerPlan(block_loops=1)),))
    one, whole = (step_time(cfg, plan, 1, MACHINE, "bf16", "owner") for plan in (window, block))
    assert one.loops < whole.loops < (one.compute + one.elementwise) / 3
    assert state_memory(cfg, 1, "bf16").optimizer == 12 * parameter_count(cfg.model)


def test_a_pipeline_of_equal_stages_waits_for_its_bubble() -> None:
    """Without what the ends of the model do beside its layers: messages are the same for both stages then."""
    one, two = (
        step_time(config(**part), VANILLA, ranks, MACHINE, "bf16", "owner") for part, ranks in (({}, 1), (TWO, 2))
    )
    assert (one.pipeline, one.bubble) == (0, 0)
    layers = pipeline_layout(config(**TWO)).counts
    assert layers == (2, 2)
    assert two.compute == pytest.approx((one.compute + 16 * output_cost(config()) / RATE) / 2)  # of the last stage
    waiting = two.bubble / (two.total - two.bubble - two.optimizer)
    assert waiting < 1 / 16 and bubble(2, 1, 16) == 1 / 17
    stream = 4096 * 4096 * 2  # bytes of a micro-batch between layers, forward and back
    assert two.pipeline == pytest.approx(16 * stream / (0.5 * MACHINE.gpu.link))
    assert two.total == pytest.approx(sum(asdict(two).values()))


def test_the_largest_stage_decides_and_the_others_fill() -> None:
    """1F1B: (M - 1) · max t_p + Σ t_p; interleaved, the filling is as short as a chunk."""
    grown = LoopPlan(4, ((3, LayerPlan(8, (0, 1, 2, 3))),))
    part = {"parallel": {**TWO["parallel"], "pipeline_model_parallel_layout": "2,2"}}
    chunks = {"parallel": {**TWO["parallel"], "virtual_pipeline_model_parallel_size": 2}}
    for sections, virtual in ((part, 1), (chunks, 2)):
        small, large = (
            config(**sections, train={"global_batch_size": size, "recompute_granularity": "none"}) for size in (2, 16)
        )
        few, many = (step_time(cfg, grown, 2, MACHINE, "bf16", "owner") for cfg in (small, large))
        busy = [time.total - time.bubble - time.optimizer for time in (few, many)]
        assert busy[1] == pytest.approx(8 * busy[0])  # of the largest stage
        assert many.bubble == pytest.approx(few.bubble)  # once per step, whatever the micro-batches
        assert few.bubble < busy[0] / 2 / virtual  # the other stage's share for one micro-batch, or a chunk
        assert many.loops > 0


def test_messages_pass_the_network_where_stages_are_on_other_nodes() -> None:
    cfg = config(tp=8, parallel=TWO["parallel"])
    time = step_time(cfg, VANILLA, 16, MACHINE, "bf16", "owner")
    stream = 4096 * 4096 * 2 // 8
    assert time.pipeline == pytest.approx(16 * stream / (0.5 * 50e9))
    assert time.data_parallel == 0
