"""FLOPs of documents: those of whole sequences where a sequence is one, and what torch's counter counts otherwise."""

from __future__ import annotations

import pytest
import torch

from megatron_sgt.arch.attended_pairs import AttendedPairs
from megatron_sgt.arch.attention import CAUSAL
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.ops.attention import causal_attention
from megatron_sgt.ops.documents import Documents
from megatron_sgt.planning.flops import batch_flops, flops_between, overhead, step_flops
from megatron_sgt.planning.hardware import find_gpu
from megatron_sgt.planning.layer_cost import layer_cost
from megatron_sgt.planning.loop_cost import loop_flops
from megatron_sgt.planning.step_time import Machine, step_time
from tests.helpers.flops import flop_counter
from tests.helpers.single import small_config

PLAN = LoopPlan(4, ((1, LayerPlan(1, (0, 3), 0.5)), (2, LayerPlan(2, (1,)))))


def whole(seq_length: int) -> AttendedPairs:
    return AttendedPairs(((seq_length, seq_length * (seq_length + 1) / 2),))


def test_a_document_per_sequence_is_what_is_assumed_without() -> None:
    config = small_config(parallel={"tensor_model_parallel_size": 2})
    length, model = config.model.seq_length, config.model
    one = whole(length)
    assert (one.square(length), one.share(length)) == (length**2, 1)
    assert step_flops(model, PLAN, 3, entropy=True, pairs=one) == step_flops(model, PLAN, 3, entropy=True)
    assert batch_flops(config, PLAN, length, 2, one) == batch_flops(config, PLAN, length, 2)
    assert flops_between(config, PLAN, 1, 9, one) == flops_between(config, PLAN, 1, 9)
    assert overhead(model, PLAN, one) == overhead(model, PLAN)
    for method in ("owner", "balanced"):
        assert loop_flops(config, method, (0, 1), 1, one) == loop_flops(config, method, (0, 1), 1)
        for index, layer in enumerate(PLAN):
            assert layer_cost(config, index, layer, method, 1, one) == layer_cost(config, index, layer, method, 1)
        machine = Machine(find_gpu("h100"))
        times = [step_time(config, PLAN, 2, machine, "bf16", method, pairs) for pairs in (None, one)]
        assert times[0] == times[1]


def test_half_the_square_leaves_half_of_the_attention() -> None:
    config = small_config(parallel={"tensor_model_parallel_size": 2})
    length, model = config.model.seq_length, config.model
    half = AttendedPairs(((length, length * (length / 2 + 1) / 2),))
    every, some = (step_flops(model, PLAN, 2, pairs=pairs) for pairs in (None, half))
    assert (some.linear, some.attention) == (every.linear, every.attention // 2)
    for method in ("owner", "balanced"):
        one, two = (loop_flops(config, method, (0, 1), 1, pairs) for pairs in (None, half))
        assert (two.linear_forward, two.attention_forward) == (one.linear_forward, one.attention_forward // 2)
    machine = Machine(find_gpu("h100"))
    slow, fast = (step_time(config, PLAN, 2, machine, "bf16", "owner", pairs) for pairs in (None, half))
    assert fast.compute < slow.compute and fast.loop_compute < slow.loop_compute
    assert (fast.elementwise, fast.tensor_parallel) == (slow.elementwise, slow.tensor_parallel)


@pytest.mark.parametrize("lengths", [((16, 16), (16, 16)), ((1, 30, 1), (7, 25)), ((32,), (5, 5, 5, 17))])
def test_attention_of_documents_is_what_the_counter_counts(lengths: tuple[tuple[int, ...], ...]) -> None:
    """Of two sequences of 32 tokens, forward and backward."""
    starts = torch.stack(
        [torch.cat([torch.full((n,), sum(row[:i]), dtype=torch.int32) for i, n in enumerate(row)]) for row in lengths]
    )
    documents = Documents.of(starts, torch.tensor([32, 32], dtype=torch.int32))
    assert documents is not None
    config = small_config(model={"seq_length": 32})
    heads, groups, size = (
        config.model.num_attention_heads, config.model.num_query_groups, config.model.kv_channels
    )  # fmt: skip
    query, key, value = (torch.randn(32, 2, n, size, requires_grad=True) for n in (heads, groups, groups))
    with flop_counter() as counter:
        causal_attention(query, key, value, documents=documents).sum().backward()
    pairs = AttendedPairs(((32, documents.pairs / 2),))
    flops = CAUSAL.flops(config.model, 0, 2, heads, groups, square=pairs.square(32))
    assert counter.get_total_flops() == flops.attention + 5 * flops.attention // 2
    assert pairs.square(32) == sum(n * n for row in lengths for n in row) / 2
