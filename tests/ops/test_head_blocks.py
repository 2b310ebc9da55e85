"""Kept heads as tensors of indices."""

import torch

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.ops.head_blocks import head_blocks, whole_blocks

SECOND = HeadLayout(8, 4, 2, tp_size=2, tp_rank=1)
"""Owns heads 4 to 7 in groups 2 and 3; a group has 2 query blocks, a key and a value block of 2 rows."""


def test_a_rank_s_own_kept_heads() -> None:
    blocks = head_blocks(SECOND, (1, 4, 7))
    assert (blocks.heads, blocks.groups, blocks.size, blocks.whole) == (2, 2, 2, False)
    assert blocks.ids.tolist() == [4, 7]
    assert blocks.rows.tolist() == [0, 10, 4, 12, 6, 14]
    assert blocks.row_index.tolist() == [row + i for row in blocks.rows.tolist() for i in (0, 1)]
    assert blocks.columns.tolist() == [0, 6]
    assert blocks.column_index.tolist() == [0, 1, 6, 7]
    assert blocks.slots.tolist() == blocks.slot_index.tolist() == [0, 1]
    assert blocks.gates.tolist() == [1.0, 1.0]
    assert {t.dtype for t in (blocks.rows, blocks.columns, blocks.slots)} == {torch.int32}
    long = (blocks.ids, blocks.row_index, blocks.column_index, blocks.slot_index)
    assert {t.dtype for t in long} == {torch.int64}


def test_a_rank_that_owns_none() -> None:
    blocks = head_blocks(SECOND, (0, 1))
    assert (blocks.heads, blocks.groups) == (0, 0)
    assert all(len(t) == 0 for t in (blocks.ids, blocks.rows, blocks.columns, blocks.row_index, blocks.gates))


def test_weights_of_kept_heads_alone() -> None:
    """Numbered through: three query blocks, then three key and three value blocks."""
    blocks = whole_blocks(SECOND, (1, 4, 7))
    assert (blocks.heads, blocks.groups, blocks.whole) == (3, 3, True)
    assert blocks.ids.tolist() == [1, 4, 7]
    assert blocks.rows.tolist() == list(range(0, 18, 2)) and blocks.row_index.tolist() == list(range(18))
    assert blocks.columns.tolist() == [0, 2, 4] and blocks.column_index.tolist() == list(range(6))
    assert blocks.slots.tolist() == [0, 1, 2]
    assert whole_blocks(SECOND, (4, 5, 7)).slots.tolist() == [0, 0, 1]
