"""Attention of the kept heads in Triton, forward; definition and formulas in ``loop_attention.py``.

Scores are kept in base-2 units, and masked ones are -1e30, never -inf. With the running maximum m, the shifted
scores t = s − m and w = exp2(t), three sums are carried: l = Σ w, a = Σ w v and (for entropies) e = Σ w t, which
is rescaled when m grows. Then o = γ a / l, log2-sum-exp = m + log2 l, entropy = ln 2 · (log2 l − e / l).

With documents a tile of queries reads keys from the start of its first row's document on, and needs no mask only
between the start of its last row's and the diagonal; a row that has seen no key yet has m = -1e30 and sums of 0, which
the first key it sees rescales to 0.

The longest tiles start first. Where tiles are few, keys are split into parts whose sums are merged by the same
rescaling in a second kernel.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sgt.ops.loop_projection_triton import precision
from megatron_sgt.ops.tiles import split_keys, tile


@triton.jit
def _scan(
    q, k_ptr, v_ptr, k_stride, v_stride, row, start, low, high, keys, m, l, e, acc, scale,
    MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, ENTROPY: tl.constexpr, H: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """Keys low..high of one head into the running sums.

    ``row`` is each query's position among the keys, ``start`` where its document begins.
    """
    column, across = tl.arange(0, BN), tl.arange(0, H)
    for n in range(low, high, BN):
        k_tile = k_ptr + (n + column)[:, None] * k_stride + across[None, :]
        v_tile = v_ptr + (n + column)[:, None] * v_stride + across[None, :]
        if MASKED:
            inside = (n + column < keys)[:, None]
            k = tl.load(k_tile, mask=inside, other=0.0)
            v = tl.load(v_tile, mask=inside, other=0.0)
        else:
            k = tl.load(k_tile)
            v = tl.load(v_tile)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if MASKED:
            seen = (n + column)[None, :] <= row[:, None]
            if DOCUMENTS:
                seen = seen & ((n + column)[None, :] >= start[:, None])
            s = tl.where(seen, s, -1.0e30)
        new = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp2(m - new)
        t = s - new[:, None]
        w = tl.exp2(t)
        if MASKED:
            w = tl.where(seen, w, 0.0)
        if ENTROPY:
            e = alpha * (e + l * (m - new)) + tl.sum(w * t, 1)
        l = alpha * l + tl.sum(w, 1)
        acc = tl.dot(w.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = new
    return m, l, e, acc


@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, gates_ptr, slots_ptr, starts_ptr, out_ptr, lse_ptr, entropy_ptr, part_acc_ptr, part_sums_ptr,
    q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
    v_stride_t, v_stride_b, v_stride_h, queries, keys, positions, batch, heads, scale, chunk,
    DOCUMENTS: tl.constexpr, ENTROPY: tl.constexpr, SPLIT: tl.constexpr, H: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One tile of queries (axis 1, longest first), one head of one sequence (axis 0), one part of its keys (axis 2)."""
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    pair = tl.program_id(0)
    b, head = pair // heads, pair % heads
    low, offset = tl.program_id(2) * chunk, keys - queries
    visible = tl.minimum(keys, offset + first + BM)
    high = tl.minimum(visible, low + chunk) if SPLIT else visible
    if DOCUMENTS:
        starts_ptr += b * positions + offset
        low = tl.maximum(low, tl.load(starts_ptr + first) // BN * BN)
    if low < high:
        query = first + tl.arange(0, BM)
        across = tl.arange(0, H)
        live = query < queries
        q_tile = q_ptr + b * q_stride_b + head * q_stride_h + query[:, None] * q_stride_t
        q = tl.load(q_tile + across[None, :], mask=live[:, None], other=0.0)
        slot = tl.load(slots_ptr + head)
        k_base = k_ptr + b * k_stride_b + slot * k_stride_h
        v_base = v_ptr + b * v_stride_b + slot * v_stride_h
        m = tl.full([BM], -1.0e30, tl.float32)
        l = tl.zeros([BM], tl.float32)
        e = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, H], tl.float32)
        # Below `even` every key is seen by every query of the tile.
        even = tl.maximum(low, tl.minimum(high, (offset + first + 1) // BN * BN))
        row = offset + query
        start = row
        if DOCUMENTS:
            start = tl.load(starts_ptr + query, mask=live, other=0)
            alike = tl.load(starts_ptr + tl.minimum(first + BM, queries) - 1)
            alike = tl.maximum(low, tl.minimum(high, tl.cdiv(alike, BN) * BN))
            m, l, e, acc = _scan(
                q, k_base, v_base, k_stride_t, v_stride_t, row, start, low, alike, keys, m, l, e, acc, scale,
                True, True, ENTROPY, H, BN, PRECISION
            )  # fmt: skip
            low, even = alike, tl.maximum(alike, even)
        m, l, e, acc = _scan(
            q, k_base, v_base, k_stride_t, v_stride_t, row, start, low, even, keys, m, l, e, acc, scale,
            False, DOCUMENTS, ENTROPY, H, BN, PRECISION
        )  # fmt: skip
        m, l, e, acc = _scan(
            q, k_base, v_base, k_stride_t, v_stride_t, row, start, even, high, keys, m, l, e, acc, scale,
            True, DOCUMENTS, ENTROPY, H, BN, PRECISION
        )  # fmt: skip
        if SPLIT:
            place = (tl.program_id(2) * batch * heads + pair) * queries + query
            plane = tl.num_programs(2) * batch * heads * queries
            _store_part(part_acc_ptr, part_sums_ptr, m, l, e, acc, place, plane, live, H)
        else:
            _finish(
                out_ptr, lse_ptr, entropy_ptr, tl.load(gates_ptr + head), m, l, e, acc,
                b, head, pair, query, live, queries, batch, heads, ENTROPY, H
            )  # fmt: skip


@triton.jit
def _store_part(part_acc_ptr, part_sums_ptr, m, l, e, acc, place, plane, live, H: tl.constexpr):
    """Store the sums of one part of the keys; ``place`` of each query's, ``plane`` of them to the next sum."""
    tl.store(part_acc_ptr + place[:, None] * H + tl.arange(0, H)[None, :], acc, mask=live[:, None])
    tl.store(part_sums_ptr + place, m, mask=live)
    tl.store(part_sums_ptr + plane + place, l, mask=live)
    tl.store(part_sums_ptr + 2 * plane + place, e, mask=live)


@triton.jit
def _finish(
    out_ptr, lse_ptr, entropy_ptr, gate, m, l, e, acc, b, head, pair, query, live, queries, batch, heads,
    ENTROPY: tl.constexpr, H: tl.constexpr
):  # fmt: skip
    """Store the outputs of one tile from its sums."""
    l = tl.where(live, l, 1.0)  # a row beyond the queries may have seen no key
    out = acc * (gate / l)[:, None]
    target = out_ptr + (b * heads + head) * H + query[:, None] * (batch * heads * H) + tl.arange(0, H)[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=live[:, None])
    row = pair * queries + query
    tl.store(lse_ptr + row, m + tl.log2(l), mask=live)
    if ENTROPY:
        tl.store(entropy_ptr + row, 0.6931471805599453 * (tl.log2(l) - e / l), mask=live)


@triton.jit
def merge_kernel(
    gates_ptr, starts_ptr, out_ptr, lse_ptr, entropy_ptr, part_acc_ptr, part_sums_ptr,
    queries, keys, positions, batch, heads, chunk, parts,
    DOCUMENTS: tl.constexpr, ENTROPY: tl.constexpr, H: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Merge the parts of one tile of queries (axis 1) of one head of one sequence (axis 0)."""
    first, pair = tl.program_id(1) * BM, tl.program_id(0)
    b, head = pair // heads, pair % heads
    query, across = first + tl.arange(0, BM), tl.arange(0, H)
    live = query < queries
    m = tl.full([BM], -1.0e30, tl.float32)
    l = tl.zeros([BM], tl.float32)
    e = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, H], tl.float32)
    plane = parts * batch * heads * queries
    row = keys - queries + query
    start = row
    if DOCUMENTS:
        start = tl.load(starts_ptr + b * positions + row, mask=live, other=0)
    for part in range(parts):
        # This row sees the part's keys if its position is not before them, nor its document after them.
        seen = live & (row >= part * chunk)
        if DOCUMENTS:
            seen = seen & (start < (part + 1) * chunk)
        place = (part * batch * heads + pair) * queries + query
        m_part = tl.load(part_sums_ptr + place, mask=seen, other=-1.0e30)
        l_part = tl.load(part_sums_ptr + plane + place, mask=seen, other=0.0)
        e_part = tl.load(part_sums_ptr + 2 * plane + place, mask=seen, other=0.0)
        a_part = tl.load(part_acc_ptr + place[:, None] * H + across[None, :], mask=seen[:, None], other=0.0)
        new = tl.maximum(m, m_part)
        old, more = tl.exp2(m - new), tl.exp2(m_part - new)
        e = old * (e + l * (m - new)) + more * (e_part + l_part * (m_part - new))
        l = old * l + more * l_part
        acc = acc * old[:, None] + a_part * more[:, None]
        m = new
    _finish(
        out_ptr, lse_ptr, entropy_ptr, tl.load(gates_ptr + head), m, l, e, acc,
        b, head, pair, query, live, queries, batch, heads, ENTROPY, H
    )  # fmt: skip


def check_addresses(*tensors: Tensor, factor: int = 1) -> None:
    """Refuse tensors whose elements 32 bits cannot count; ``factor``: copies of the first that will be made."""
    largest = max(1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors)
    largest = max(largest, factor * tensors[0].numel())
    if largest >= 2**31:
        raise ValueError(f"attention of kept heads: {largest} elements are more than 2^31; use shorter batches")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    slots: Tensor,
    entropy: bool,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``loop_attention.attend``; tensors of less than 2^31 elements each (addresses are 32 bits wide).

    ``starts`` is contiguous; ``ends`` are for the backward pass.
    """
    queries, batch, heads, size = query.shape
    keys = key.shape[0]
    out = query.new_empty(queries, batch, heads, size)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    rows = torch.empty_like(lse) if entropy else lse.new_empty(0)
    shape, launch = tile("attend", query, size)
    tiles = triton.cdiv(queries, shape["BM"])
    chunk = split_keys(query, keys, batch * heads * tiles)
    parts = triton.cdiv(keys, chunk)
    split = parts > 1
    check_addresses(query, key, value, factor=parts)
    documented = starts is not None
    begins, positions = (slots, keys) if starts is None else (starts, starts.shape[1])
    part_acc = lse.new_empty((parts, batch, heads, queries, size) if split else 0)
    part_sums = lse.new_empty((3, parts, batch, heads, queries) if split else 0)
    attend_kernel[(batch * heads, tiles, parts)](
        query, key, value, gates, slots, begins, out, lse, rows, part_acc, part_sums,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        queries, keys, positions, batch, heads, math.log2(math.e) / math.sqrt(size), chunk,
        DOCUMENTS=documented, ENTROPY=entropy, SPLIT=split, H=size, PRECISION=precision(query), **shape, **launch
    )  # fmt: skip
    if split:
        merge_kernel[(batch * heads, tiles)](
            gates, begins, out, lse, rows, part_acc, part_sums, queries, keys, positions, batch, heads, chunk, parts,
            DOCUMENTS=documented, ENTROPY=entropy, H=size, BM=shape["BM"], num_warps=4
        )  # fmt: skip
    return out, lse, rows
