"""Every index of the layout against a dense computation, over all small combinations."""

import itertools

import pytest
import torch
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.ops.attention import causal_attention_reference
from tests.helpers.single import small_config

COMBINATIONS = [
    (heads, groups, tp)
    for heads in (1, 2, 3, 4, 6, 8)
    for groups in range(1, heads + 1)
    for tp in (1, 2, 3, 4)
    if heads % groups == 0 and groups % tp == 0 and heads % tp == 0
]
HEAD_DIM = 3


def layouts(heads: int, groups: int, tp: int) -> list[HeadLayout]:
    return [HeadLayout(heads, groups, HEAD_DIM, tp, rank) for rank in range(tp)]


def kept_sets(heads: int) -> list[tuple[int, ...]]:
    """All subsets up to four heads, a spread of them beyond."""
    sizes = range(heads + 1) if heads <= 4 else (0, 1, 2, heads - 1, heads)
    return [kept for size in sizes for kept in itertools.combinations(range(heads), size)]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[S, heads * HEAD_DIM] and [S, groups * HEAD_DIM] -> [S, heads, HEAD_DIM]."""
    parts = (t.view(len(t), 1, -1, HEAD_DIM) for t in (query, key, value))
    return causal_attention_reference(*parts)[:, 0]


@pytest.mark.parametrize(("heads", "groups", "tp"), COMBINATIONS)
def test_kept_heads_compute_what_masked_dense_heads_compute(heads: int, groups: int, tp: int) -> None:
    """Dense weights in Hugging Face order and a mask on the heads, against each rank's selected indices."""
    length, hidden = 5, 7
    generator = torch.Generator().manual_seed(heads * 100 + groups * 10 + tp)
    sizes = [heads * HEAD_DIM, groups * HEAD_DIM, groups * HEAD_DIM]
    stacked = torch.randn(sum(sizes), hidden, generator=generator, dtype=torch.float64)
    projection = torch.randn(hidden, heads * HEAD_DIM, generator=generator, dtype=torch.float64)
    x = torch.randn(length, hidden, generator=generator, dtype=torch.float64)
    dense = attend(*(x @ stacked.T).split(sizes, dim=1))
    ranks = layouts(heads, groups, tp)
    fused = stacked[ranks[0].fused_qkv_order()].chunk(tp)
    columns = projection.chunk(tp, dim=1)
    for kept in kept_sets(heads):
        mask = torch.tensor([float(head in kept) for head in range(heads)], dtype=torch.float64)
        wanted = (dense * mask[:, None]).reshape(length, -1) @ projection.T
        total = torch.zeros_like(wanted)
        for layout, weight, out in zip(ranks, fused, columns, strict=True):
            mine = layout.local(kept)
            assert layout.kept_counts(kept) == (len(mine.heads), len(mine.groups))
            if not mine.heads:
                assert mine.groups == mine.kv_slot == mine.qkv_rows == mine.proj_columns == ()
                continue
            parts = (len(mine.heads) * HEAD_DIM, *[len(mine.groups) * HEAD_DIM] * 2)
            query, key, value = (x @ weight[list(mine.qkv_rows)].T).split(parts, dim=1)
            key, value = (t.view(length, -1, HEAD_DIM)[:, list(mine.kv_slot)].reshape(length, -1) for t in (key, value))
            partial = attend(query, key, value).reshape(length, -1)
            total += partial @ out[:, list(mine.proj_columns)].T
        torch.testing.assert_close(total, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("heads", "groups", "tp"), COMBINATIONS)
def test_bookkeeping(heads: int, groups: int, tp: int) -> None:
    ranks = layouts(heads, groups, tp)
    rows = (heads + 2 * groups) * HEAD_DIM
    for layout in ranks:
        assert (layout.heads_per_rank, layout.groups_per_rank) == (heads // tp, groups // tp)
        assert layout.heads_per_group == heads // groups
        assert sorted(layout.fused_qkv_order()) == list(range(rows))
        everything = layout.local(range(heads))
        assert everything.heads == tuple(range(heads // tp))
        assert sorted(everything.qkv_rows) == list(range(rows // tp))
        assert everything.proj_columns == tuple(range(heads // tp * HEAD_DIM))
        assert everything.kv_slot == tuple(head // (heads // groups) for head in everything.heads)
    assert [head for layout in ranks for head in layout.owned_heads] == list(range(heads))
    for head in range(heads):
        owners = [layout.tp_rank for layout in ranks if head in layout.owned_heads]
        assert owners == [ranks[0].owner(head)]
        owned = [layout.local([head]).heads for layout in ranks]
        assert sum(map(len, owned)) == 1 and owned[owners[0]] == (head - ranks[owners[0]].owned_heads.start,)


def test_layout_of_a_model() -> None:
    model = small_config(model={"num_query_groups": 2, "kv_channels": 24}).model
    assert HeadLayout.of(model, 2, 1) == HeadLayout(4, 2, 24, tp_size=2, tp_rank=1)
    assert HeadLayout.of(model) == HeadLayout(4, 2, 24)


def test_kept_heads_may_come_in_any_order() -> None:
    layout = HeadLayout(8, 4, HEAD_DIM, 2, 1)
    assert layout.local([7, 1, 4, 5]) == layout.local((1, 4, 5, 7))
    assert layout.local((4, 5, 7)).groups == (0, 1)
    assert layout.local((4, 5, 7)).kv_slot == (0, 0, 1)


def test_fused_order_of_a_small_model_by_hand() -> None:
    """Four heads, two groups, head size 1: q0 q1 k0 v0 q2 q3 k1 v1."""
    assert HeadLayout(4, 2, 1).fused_qkv_order() == [0, 1, 4, 6, 2, 3, 5, 7]


@pytest.mark.parametrize(
    ("heads", "groups", "tp", "message"),
    [
        (6, 6, 4, "num_heads 6 is not divisible by tensor parallel size 4"),
        (8, 2, 4, "num_groups 2 is not divisible by tensor parallel size 4"),
        (8, 3, 1, "num_heads 8 is not divisible by num_groups 3"),
    ],
)
def test_what_does_not_divide_is_refused(heads: int, groups: int, tp: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadLayout(heads, groups, HEAD_DIM, tp)
