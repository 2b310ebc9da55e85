"""The cost model's bytes by hand, its operations against torch's counter on four ranks, and the choice."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.engine.build import start_processes
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.apply_plan import apply_plan, begin_step
from megatron_sgt.model.gpt import build_model
from megatron_sgt.planning.loop_cost import choose_loop_method, loop_cost, loop_flops
from tests.helpers.flops import flop_counter
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config

MODEL = {
    "num_layers": 4,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "seq_length": 1024,
    "vocab_size": 128,
}


def config(tp: int, sequence_parallel: bool = True, **parallel: object):  # type: ignore[no-untyped-def]
    layout = {"tensor_model_parallel_size": tp, "sequence_parallel": sequence_parallel, **parallel}
    return small_config(model={**MODEL, "ffn_hidden_size": 8192}, parallel=layout)


NORM = 2 * 4096 * 2
"""The norm's gradient, all-reduced under sequence parallelism: counted twice, two bytes an element."""


def test_bytes_of_two_heads_of_32() -> None:
    """T = 1024, B = 2, D = 4096, H = 128, two bytes an element."""
    owner, balanced = (loop_cost(config(4), method, (0, 1)) for method in ("owner", "balanced"))
    assert owner.bytes_forward == owner.bytes_backward - NORM == 2 * 2048 * 4096 * 2
    assert balanced.bytes_forward == balanced.bytes_backward - NORM == 2 * 2048 * 2 * 128 * 2
    assert owner.bytes_forward == 16 * balanced.bytes_forward


def test_bytes_without_sequence_parallelism() -> None:
    balanced = loop_cost(config(4, sequence_parallel=False), "balanced", (0, 1))
    assert balanced.bytes_forward == (2 + 1) * 2048 * 2 * 128 * 2
    assert balanced.bytes_backward == (2 + 3) * 2048 * 2 * 128 * 2


def test_flops_of_the_busiest_rank() -> None:
    """Both heads on one rank: the owner does everything, balanced a quarter of it and 7/16 of the triangle."""
    projections, attention = 2 * 2048 * 4096 * 8 * 128, 4 * 2048 * 1024 * 2 * 128
    owner, balanced = (loop_cost(config(4), method, (0, 1)) for method in ("owner", "balanced"))
    assert owner.flops.needed == 3 * projections + 3.5 * attention / 2
    assert balanced.flops.needed == 3 * projections / 4 + 3.5 * attention / 2 * 7 / 16
    assert balanced.seconds < owner.seconds


def test_heads_that_are_spread_cost_their_owners_less() -> None:
    together, spread = (loop_cost(config(4), "owner", heads) for heads in ((0, 1), (0, 31)))
    assert together.flops.forward == 2 * spread.flops.forward


COUNTED: list[tuple[str, bool, dict[str, Any], tuple[int, ...]]] = [
    (method, sharded, model, heads)
    for method in ("owner", "balanced")
    for sharded in (False, True)
    for model, heads in (({}, (0, 1)), ({"num_query_groups": 4}, (1, 2, 7)), ({"qk_layernorm": True}, (6,)))
]
OVER_ALL = {"qk_layernorm": True, "qk_layernorm_over": "all", "num_query_groups": 4}
COUNTED += [("owner", sharded, OVER_ALL, (1, 6)) for sharded in (False, True)]


def count_loops(info: RankInfo) -> list[tuple[int, int]]:
    """(forward, backward) operations of the loop on this rank by torch's counter, for each of COUNTED."""
    counted = []
    for method, sharded, model, heads in COUNTED:
        cfg = small_config(
            growth={"top_k_layers": 1},
            model={"num_layers": 2, "num_attention_heads": 8, **model},
            parallel={
                "tensor_model_parallel_size": info.world_size,
                "sequence_parallel": sharded,
                "loop_method": method,
            },
        )
        built = build_model(cfg, start_processes(cfg, info), "fp32", 2)
        totals = []
        for layers in ((), ((1, LayerPlan(1, heads)),)):
            apply_plan(built, LoopPlan(2, layers))
            begin_step(built)
            batch = random_batch(cfg)
            with flop_counter() as forward:
                loss = built(**batch)
            with flop_counter() as backward:
                loss.backward()
            totals.append((forward.get_total_flops(), backward.get_total_flops()))
        (plain, back), (looped, looped_back) = totals
        counted.append((looped - plain, looped_back - back))
    return counted


@pytest.fixture(scope="module")
def counts() -> list[list[tuple[int, int]]]:
    return run_on_ranks(4, count_loops, timeout=300)


def test_operations_of_every_rank_equal_torchs_counter(counts: list[list[tuple[int, int]]]) -> None:
    for rank, counted in enumerate(counts):
        for case, (forward, backward) in zip(COUNTED, counted, strict=True):
            method, sharded, model, heads = case
            cfg = small_config(
                growth={"top_k_layers": 1},
                model={"num_layers": 2, "num_attention_heads": 8, **model},
                parallel={"tensor_model_parallel_size": 4, "sequence_parallel": sharded},
            )
            flops = loop_flops(cfg, method, heads, rank)  # type: ignore[arg-type]
            assert (flops.forward, flops.executed - flops.forward) == (forward, backward), (rank, case)


def test_balanced_ranks_do_the_same_but_for_the_causal_term(counts: list[list[tuple[int, int]]]) -> None:
    """As measured: what differs between ranks is attention over the (r+1)·S/t keys that rank r sees."""
    for number, (method, sharded, model, heads) in enumerate(COUNTED):
        if method == "owner":
            continue
        per_key = 4 * 2 * len(heads) * 8 * 8  # S/t = 8 queries of 2 sequences, H = 8
        rest = [
            (forward - per_key * 8 * (rank + 1), backward - 5 * per_key * 8 * (rank + 1) // 2)
            for rank, (forward, backward) in enumerate(c[number] for c in counts)
        ]
        assert len(set(rest)) == 1, (sharded, model, heads)


@pytest.mark.parametrize(
    ("tp", "extra", "method", "reason"),
    [
        (1, {"sequence_parallel": False}, "owner", "one tensor-parallel rank"),
        (4, {}, "balanced", "balanced looping over 4"),
        (4, {"loop_method": "owner"}, "owner", "parallel.loop_method"),
    ],
)
def test_choice(tp: int, extra: dict[str, object], method: str, reason: str) -> None:
    chosen, why = choose_loop_method(config(tp, **extra))
    assert chosen == method
    assert reason in why


def test_what_balanced_looping_cannot_do_is_left_to_the_owner() -> None:
    odd = small_config(model={"seq_length": 31}, parallel={"tensor_model_parallel_size": 2})
    assert choose_loop_method(odd)[0] == "owner"
    entry = {"until_steps": 2, "seq_length": 2}
    pieces = small_config(data={"seq_length_curriculum": [entry]}, parallel={"tensor_model_parallel_size": 4})
    assert choose_loop_method(pieces) == ("owner", "owner looping: seq_length 2 does not divide over 4 ranks")
    dropout = small_config(model={"attention_dropout": 0.1}, parallel={"tensor_model_parallel_size": 2})
    assert choose_loop_method(dropout)[0] == "owner"
    over_all = {"qk_layernorm": True, "qk_layernorm_over": "all"}
    chosen, why = choose_loop_method(small_config(model=over_all, parallel={"tensor_model_parallel_size": 2}))
    assert chosen == "owner" and "over all heads" in why


def test_a_recorded_run_loops_as_one_that_decides(tmp_path: Path) -> None:
    """Heads that were recorded on several ranks change nothing: how many are kept is what is compared."""
    growth = {"num_keep_heads": 2, "window_size": 5}
    event = {"kind": "growth", "step": 4, "action": "first_selection", "layer": 1, "kept_heads": {"1": [0, 7]}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    sizes = {"num_attention_heads": 8, "num_query_groups": 8, "hidden_size": 64}
    ranks = {"tensor_model_parallel_size": 4}
    decides = small_config(model=sizes, parallel=ranks, growth=growth)
    repeats = small_config(model=sizes, parallel=ranks, growth={**growth, "replay": str(tmp_path / "metrics.jsonl")})
    assert choose_loop_method(repeats) == choose_loop_method(decides)
