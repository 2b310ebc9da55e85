"""Positions of kept heads in the weights of one rank, as tensors (as numbers: ``arch.head_layout.KeptHeads``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout


@dataclass(frozen=True)
class HeadBlocks:
    """The h kept heads in g key/value groups that a rank loops, as blocks of a fused projection and of W_o.

    ``ids`` [h] int64: global ids. ``heads``: h; ``groups``: g; ``size``: H.
    ``head_index`` [h] and ``group_index`` [g] int64: which of the heads and groups of the weights they are.
    ``rows`` [h + 2g] and ``columns`` [h] int32: first row (column) of each block, see ``loop_projection``;
    ``row_index`` [(h + 2g) H] and ``column_index`` [h H] int64: all rows (columns) of the blocks.
    ``slots`` [h] int32 and ``slot_index`` [h] int64: group of each head. ``gates`` [h] fp32.
    ``whole``: the weights hold only these rows (columns), in order.
    """

    ids: Tensor
    head_index: Tensor
    group_index: Tensor
    heads: int
    groups: int
    size: int
    rows: Tensor
    columns: Tensor
    row_index: Tensor
    column_index: Tensor
    slots: Tensor
    slot_index: Tensor
    gates: Tensor
    whole: bool = False


def head_blocks(layout: HeadLayout, kept_heads: Sequence[int]) -> HeadBlocks:
    """Those of the global ``kept_heads`` that the rank of ``layout`` owns, in its own weights; every gate is 1.

    All tensors lie on the host.
    """
    kept, size = layout.local(kept_heads), layout.head_dim
    slots, row_index, columns = _index(kept.kv_slot), _index(kept.qkv_rows), _index(kept.proj_columns)
    return HeadBlocks(
        ids=_index(head + layout.owned_heads.start for head in kept.heads),
        head_index=_index(kept.heads),
        group_index=_index(kept.groups),
        heads=len(kept.heads),
        groups=len(kept.groups),
        size=size,
        rows=row_index[::size].to(torch.int32),
        columns=columns[::size].to(torch.int32),
        row_index=row_index,
        column_index=columns,
        slots=slots.to(torch.int32),
        slot_index=slots,
        gates=torch.ones(len(kept.heads)),
    )


def whole_blocks(layout: HeadLayout, kept_heads: Sequence[int]) -> HeadBlocks:
    """All ``kept_heads``, whichever rank owns them, in weights that hold nothing else; every gate is 1."""
    blocks = head_blocks(replace(layout, tp_size=1, tp_rank=0), kept_heads)
    rows = torch.arange(len(blocks.row_index))
    columns = rows[: len(blocks.column_index)]
    return replace(
        blocks,
        head_index=torch.arange(blocks.heads),
        group_index=torch.arange(blocks.groups),
        rows=rows[:: blocks.size].to(torch.int32),
        columns=columns[:: blocks.size].to(torch.int32),
        row_index=rows,
        column_index=columns,
        whole=True,
    )


def _index(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)
