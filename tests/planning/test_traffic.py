"""The traffic formulas equal what four gloo ranks really send, to the byte and to the call."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from megatron_sgt.config import Config
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.step import train_step
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.apply_plan import apply_plan, begin_step, mark_micro_batch
from megatron_sgt.model.gpt import build_model
from megatron_sgt.planning.tensor_traffic import Transfer, loop_pass_traffic
from megatron_sgt.planning.traffic import group_sizes, step_traffic
from tests.helpers.collectives import CollectiveCounter
from tests.helpers.exhaustive import exhaustive, share_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config

RANKS = 4
MODELS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped query": {"num_query_groups": 4},
    "q/k norm, biases, dropout, LayerNorm": {
        "num_query_groups": 4,
        "qk_layernorm": True,
        "add_bias_linear": True,
        "normalization": "LayerNorm",
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
Layout = tuple[str, str, bool, str]
EVERY = list(itertools.product(MODELS, ("owner", "balanced"), (False, True), ("none", "selective", "full")))
EVERY = [case for case in EVERY if case[:2] != ("OLMo-2", "balanced")]
SHARE = [*EVERY[::7], ("OLMo-2", "owner", False, "none"), ("OLMo-2", "owner", True, "full")]
"""Each method, sharding and recompute meets each other, each method every model."""


def layout_config(model: dict[str, Any], method: str, sharded: bool, recompute: str) -> Config:
    """Two micro-batches of a model of two layers on RANKS tensor-parallel ranks."""
    return small_config(
        growth={"top_k_layers": 1, "max_loop_depth": 3},
        model={"num_layers": 2, "num_attention_heads": 8, **model},
        parallel={
            "tensor_model_parallel_size": RANKS,
            "sequence_parallel": sharded,
            "loop_method": method,
        },
        train={"recompute_granularity": recompute, "global_batch_size": 4},
    )


def expected(transfers: tuple[Transfer, ...], size: int) -> tuple[Counter, Counter]:
    """(bytes, calls) by (kind, size of the group)."""
    payload: Counter = Counter()
    calls: Counter = Counter()
    for item in transfers:
        payload[item.kind, size] += item.payload
        calls[item.kind, size] += item.calls
    return payload, calls


def tensor_parallel_steps(info: RankInfo, layouts: list[Layout], ways: int) -> list[str]:
    """Every layout and plan whose count differs from the formula, on this rank.

    ways: of so many parts of the plans, two layouts after each other have the same one, in turn.
    """
    wrong = []
    for number, (model, *settings) in enumerate(layouts):
        config = layout_config(MODELS[model], *settings)  # type: ignore[arg-type]
        groups = start_processes(config, info)
        built = build_model(config, groups, "fp32", 4)
        for name, layers in list(PLANS.items())[number // 2 % ways :: ways]:
            plan = LoopPlan(2, layers)
            apply_plan(built, plan)
            begin_step(built)
            built.meter.enabled = True
            with CollectiveCounter() as counter:
                for seed in (0, 1):
                    mark_micro_batch(built, last=seed == 1)
                    built(**random_batch(config, seed)).backward()
                    built.meter.end_micro_batch()
                built.meter.reduce(groups)
            formula = expected(step_traffic(config, plan, RANKS, "fp32", settings[0], entropy=True), RANKS)
            if (counter.bytes, counter.calls) != formula:
                wrong.append(f"{model}, {settings}, {name}: {counter.bytes} {counter.calls} not {formula}")
    return wrong


@pytest.mark.parametrize(("layouts", "ways"), [(SHARE, 2), exhaustive((EVERY, 1))], ids=["a share", "all"])
def test_tensor_parallel_collectives_to_the_byte_and_to_the_call(layouts: list[Layout], ways: int) -> None:
    found = run_on_ranks(RANKS, tensor_parallel_steps, layouts, ways, timeout=600, backend="gloo")
    for rank, wrong in enumerate(found):
        assert not wrong, f"rank {rank}:\n" + "\n".join(wrong)


RELEASED = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
EVERYTHING = {"stage3_param_persistence_threshold": 0}
DATA_PARALLEL: list[tuple[int, str, str, dict[str, int], str]] = [
    (0, "fp32", "none", {}, "fp32"),
    (1, "fp32", "none", {}, "fp32"),
    (1, "bf16", "none", {}, "fp32"),
    (1, "bf16", "none", {}, "model"),
    (2, "bf16", "none", {}, "fp32"),
    (2, "bf16", "none", {}, "model"),
    (3, "bf16", "none", {}, "fp32"),
    (3, "bf16", "none", EVERYTHING, "model"),
    (3, "bf16", "full", {**EVERYTHING, **RELEASED}, "fp32"),
]
"""(ZeRO stage, precision, recompute, zero_optimization, optim.grad_reduce_dtype)"""


def data_parallel_steps(info: RankInfo) -> list[str]:
    """The same for ZeRO, in the second step (the first one of stage 3 records the order of the modules)."""
    wrong = []
    for stage, precision, recompute, zero, reduced in DATA_PARALLEL:
        config = small_config(
            growth={"top_k_layers": 1},
            model={"num_layers": 2},
            deepspeed={"zero_optimization": zero} if zero else {},
            optim={"grad_reduce_dtype": reduced},
            parallel={"zero_stage": stage},
            train={
                "precision": precision,
                "global_batch_size": 4 * RANKS,
                "recompute_granularity": recompute,
            },
        )
        groups = start_processes(config, info)
        runtime = build_runtime(config, groups)
        for _ in range(2):
            with CollectiveCounter() as counter:
                train_step(runtime.engine, [random_batch(config, seed) for seed in (0, 1)], 1e-3, 1.0, groups)
        payload, calls = expected(step_traffic(config, LoopPlan.empty(2), RANKS, precision, "owner"), RANKS)
        for kind in ("all_gather", "reduce_scatter", "all_reduce"):
            counted = counter.bytes[kind, RANKS] - counter.control[kind, RANKS]
            messages = counter.calls[kind, RANKS] - counter.control_calls[kind, RANKS]
            if counted != payload[kind, RANKS] or (stage < 3 and messages != calls[kind, RANKS]):
                case = f"ZeRO-{stage} {precision} {reduced} {kind} {zero}"
                wrong.append(f"{case}: {messages} calls, {counted} bytes, not {payload} {calls}")
    return wrong


def test_data_parallel_collectives_by_zero_stage() -> None:
    """To the byte; to the call up to stage 2. Stage 3 fetches by prefetch buckets, whose number is a bound."""
    for rank, wrong in enumerate(run_on_ranks(RANKS, data_parallel_steps, timeout=300, backend="gloo")):
        assert not wrong, f"rank {rank}:\n" + "\n".join(wrong)


MANY_HEADS = {"hidden_size": 256, "num_attention_heads": 32}


def bytes_of_a_loop(info: RankInfo) -> dict[str, int]:
    """Counted payload that one loop pass of 2 of 32 heads adds to each further micro-batch, by way of looping."""
    added = {}
    for method in ("owner", "balanced"):
        config = layout_config(MANY_HEADS, method, True, "none")
        built = build_model(config, start_processes(config, info), "fp32", 4)
        counts = []
        for layers in ((), ((1, LayerPlan(1, (0, 1))),)):
            apply_plan(built, LoopPlan(2, layers))
            for micro_batches in (1, 2):
                begin_step(built)
                with CollectiveCounter() as counter:
                    for seed in range(micro_batches):
                        mark_micro_batch(built, last=seed == micro_batches - 1)
                        built(**random_batch(config, seed)).backward()
                counts.append(sum(counter.bytes.values()))
        added[method] = (counts[3] - counts[2]) - (counts[1] - counts[0])
    return added


def test_a_balanced_pass_sends_an_eighth_of_the_owners_as_counted() -> None:
    """Counted: at most 1.1 times 2·S·B·(keys and values) per direction, and an eighth of the owner's."""
    config = layout_config(MANY_HEADS, "balanced", True, "none")
    both_ways = 2 * 2 * config.train.micro_batch_size * config.model.seq_length * 2 * 8 * 4
    for added in run_on_ranks(RANKS, bytes_of_a_loop, backend="gloo"):
        assert added["balanced"] <= 1.1 * both_ways
        assert added["balanced"] <= added["owner"] / 8


@pytest.mark.parametrize("sharded", [True, False])
def test_two_of_32_heads_send_an_eighth_of_the_owners_bytes(sharded: bool) -> None:
    """D = 4096, H = 128, multi-head: 16 times less under sequence parallelism, 4 to 6.4 times without."""
    wide = {"hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 128}
    config = layout_config(wide, "balanced", sharded, "none")
    plan = LayerPlan(1, (0, 1))

    def sent(method: Any) -> float:
        both = loop_pass_traffic(config, plan, "bf16", method)
        return sum(item.wire_bytes(RANKS) for way in both for item in way)

    assert sent("balanced") <= sent("owner") / (8 if sharded else 4)


def test_what_travels_once_per_step_does_not_grow_with_depth() -> None:
    config = layout_config({}, "balanced", True, "none")
    shallow, deep = (
        {t.part: t for t in step_traffic(config, LoopPlan(2, ((1, LayerPlan(k, (0, 1))),)), RANKS, "bf16", "balanced")}
        for k in (1, 3)
    )
    assert shallow["kept weights"] == deep["kept weights"]
    assert deep["loops"].payload == 3 * shallow["loops"].payload


def test_one_process_sends_nothing() -> None:
    assert step_traffic(small_config(), LoopPlan.empty(4), 1, "bf16", "owner", entropy=True) == ()


PIPELINES: dict[str, dict[str, Any]] = {
    "PP2 x TP2 + SP, balanced loops": {
        "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "loop_method": "balanced"},
        "loops": ((3, LayerPlan(2, (0, 1))),),
    },
    "PP2 x DP2, ZeRO-2": {"parallel": {"zero_stage": 2}, "precision": "bf16"},
    "PP2 x DP2, interleaved, ZeRO-1": {
        "parallel": {"virtual_pipeline_model_parallel_size": 2},
        "precision": "bf16",
        "recompute": "full",
    },
    "PP4, tied": {"parallel": {"pipeline_model_parallel_size": 4}, "tied": True},
    "PP2 x TP2, tied, owner loops": {
        "parallel": {"tensor_model_parallel_size": 2, "loop_method": "owner"},
        "tied": True,
        "loops": ((1, LayerPlan(1, (0, 1))),),
    },
}
"""Each with four micro-batches on RANKS ranks."""


def pipeline_step(info: RankInfo, case: dict[str, Any]) -> tuple[dict[Any, int], dict[Any, int]]:
    """(counted, formula) of this rank: bytes by (kind, size of the group; of messages 0), without flags and norms."""
    precision, parallel = case.get("precision", "fp32"), {"pipeline_model_parallel_size": 2, **case["parallel"]}
    data = RANKS // parallel["pipeline_model_parallel_size"] // parallel.get("tensor_model_parallel_size", 1)
    config = small_config(
        growth={"top_k_layers": 1, "max_loop_depth": 3},
        model={"untie_embeddings_and_output_weights": not case.get("tied", False)},
        parallel=parallel,
        train={
            "precision": precision,
            "global_batch_size": 8 * data,
            "recompute_granularity": case.get("recompute", "none"),
        },
    )
    groups = start_processes(config, info)
    runtime = build_runtime(config, groups)
    plan = LoopPlan(4, case.get("loops", ()))
    apply_plan(runtime.engine.module, plan)
    with CollectiveCounter() as counter:
        train_step(runtime.engine, [random_batch(config, seed) for seed in range(4)], 1e-3, 1.0, groups)
    sizes = group_sizes(config, RANKS)
    formula: Counter = Counter()
    method = parallel.get("loop_method", "owner")
    for item in step_traffic(config, plan, RANKS, precision, method, pipeline_stage=groups.pp_rank):
        formula[item.kind, 0 if item.kind == "send" else sizes[item.group]] += item.payload
    counted: Counter = Counter()
    for (kind, size), number in counter.bytes.items():
        # Interleaved, Megatron-Core sends between two stages over the world as well.
        counted[kind, 0 if kind in ("send", "receive") else size] += number - counter.control[kind, size]
    return {key: size for key, size in counted.items() if size}, dict(formula)


@pytest.mark.parametrize("case", share_of(PIPELINES, list(PIPELINES)[:4]))
def test_every_stage_of_a_pipeline_sends_to_the_byte_what_the_formula_says(case: str) -> None:
    """And the stages receive together what they send, which no formula counts again."""
    sent = received = 0
    by_rank = run_on_ranks(RANKS, pipeline_step, PIPELINES[case], timeout=300, backend="gloo")
    for rank, (counted, formula) in enumerate(by_rank):
        sent += sum(size for (kind, _), size in counted.items() if kind == "send")
        received += sum(size for (kind, _), size in counted.items() if kind == "receive")
        assert {key: size for key, size in counted.items() if key[0] != "receive"} == formula, f"rank {rank}"
    assert sent == received > 0
