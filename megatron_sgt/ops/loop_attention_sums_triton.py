"""Attention of the kept heads in Triton: the sums before and after the launch that makes the gradients.

δ of every query, which that launch reads; and where it left gradients in parts (``loop_attention_backward_triton.py``),
their sums.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def delta_kernel(
    dout_ptr, out_ptr, delta_ptr, queries, batch, heads, H: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """δ of one tile of queries (axis 1) of one head of one sequence (axis 0)."""
    pair = tl.program_id(0)
    query, across = tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, H)
    live = query < queries
    place = pair * H + query[:, None] * (batch * heads * H) + across[None, :]
    do = tl.load(dout_ptr + place, mask=live[:, None], other=0.0).to(tl.float32)
    out = tl.load(out_ptr + place, mask=live[:, None], other=0.0).to(tl.float32)
    tl.store(delta_ptr + pair * queries + query, tl.sum(do * out, 1), mask=live)


@triton.jit
def last_query(ends_ptr, key, offset, queries):
    """The query after the last one of the document of ``key``; 0 if it has none."""
    return tl.maximum(0, tl.minimum(queries, tl.load(ends_ptr + key) - offset))


@triton.jit
def _sum_parts(
    parts_ptr, out_ptr, first, rows, pair, pairs, low, high, H: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Rows first..first + BM of parts low..high, added up in this order."""
    row, across = first + tl.arange(0, BM), tl.arange(0, H)
    live = (row < rows)[:, None]
    place = row[:, None] * (pairs * H) + pair * H + across[None, :]
    total = tl.zeros([BM, H], tl.float32)
    for part in range(low, high):
        total += tl.load(parts_ptr + part * (rows * pairs * H) + place, mask=live, other=0.0)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def sum_parts_kernel(
    part_q_ptr, part_k_ptr, part_v_ptr, starts_ptr, ends_ptr, dq_ptr, dk_ptr, dv_ptr,
    queries, keys, positions, batch, heads, groups, chunk, DOCUMENTS: tl.constexpr,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """One tile (axis 1) of one head or group of one sequence (axis 0) of dq, dk or dv (axis 2).

    Tiles are those of ``attend_backward_kernel``, so that it is known which parts of them were stored.
    """
    pair, rank, kind = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offset = keys - queries
    if kind == 0:
        if (pair < batch * heads) & (rank * BM < queries):
            low, high = 0, tl.cdiv(tl.minimum(keys, offset + rank * BM + BM), chunk)
            if DOCUMENTS:
                low = tl.load(starts_ptr + pair // heads * positions + offset + rank * BM) // chunk
            _sum_parts(part_q_ptr, dq_ptr, rank * BM, queries, pair, batch * heads, low, high, H, BM)
    elif (pair < batch * groups) & (rank * BN < keys):
        low, high = tl.maximum(rank * BN - offset, 0) // BM * BM // chunk, tl.cdiv(queries, chunk)
        if DOCUMENTS:
            last = tl.minimum(rank * BN + BN, keys) - 1
            high = tl.cdiv(last_query(ends_ptr + pair // groups * positions, last, offset, queries), chunk)
        if kind == 1:
            _sum_parts(part_k_ptr, dk_ptr, rank * BN, keys, pair, batch * groups, low, high, H, BN)
        else:
            _sum_parts(part_v_ptr, dv_ptr, rank * BN, keys, pair, batch * groups, low, high, H, BN)
