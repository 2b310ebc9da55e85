"""Attention of the kept heads in Triton, backward; definition and formulas in ``loop_attention.py``.

One launch makes all gradients, without atomics: some programs own a tile of keys of one group (dk, dv, summed over
the heads that read the group), the others a tile of queries of one head (dq). Under causality the first tiles of
keys and the last tiles of queries are the longest; both start first. Where tiles are few, what a tile sums over is
split into parts, whose fp32 sums a second kernel adds up in their order.

With documents a tile of keys sums over queries up to the end of its last key's document, a tile of queries over keys
from the start of its first row's. Keys that no query sees, as those of documents before a share of the queries, have
gradients of 0.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sgt.ops.loop_attention_sums_triton import delta_kernel, last_query, sum_parts_kernel
from megatron_sgt.ops.loop_attention_triton import check_addresses
from megatron_sgt.ops.loop_projection_triton import precision
from megatron_sgt.ops.tiles import BACKWARD_PART, split_keys, tile


@triton.jit
def _key_side(
    k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_stride, do_stride, gate, column, end, low, high, offset, queries,
    full, shut, dk, dv, scale,
    DOCUMENTS: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Queries low..high of one head into dk (without 1/sqrt(H)) and dv of one tile of keys.

    From ``full`` on they see all keys of the tile; with documents until ``shut``, and none of them from the ``end`` of
    each key's document on. Those beyond the last query are read as zeros, which add nothing.
    """
    across = tl.arange(0, H)
    for i in range(low, high, BM):
        query = i + tl.arange(0, BM)
        live = query < queries
        q = tl.load(q_ptr + query[:, None] * q_stride + across[None, :], mask=live[:, None], other=0.0)
        do = tl.load(do_ptr + query[:, None] * do_stride + across[None, :], mask=live[:, None], other=0.0)
        lse = tl.load(lse_ptr + query, mask=live, other=0.0)
        # Transposed, [keys, queries]: p and ds then feed the next products from registers.
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        p = tl.exp2(s - lse[None, :])
        if DOCUMENTS:
            if (i < full) | (i + BM > shut):
                row = (offset + query)[None, :]
                p = tl.where((column[:, None] <= row) & (row < end[:, None]), p, 0.0)
        elif i < full:
            p = tl.where(column[:, None] <= (offset + query)[None, :], p, 0.0)
        dv = tl.dot((p * gate).to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION) * gate
        delta = tl.load(delta_ptr + query, mask=live, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _query_side(
    q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, gate, row, start, low, alike, even, high, keys, dq, scale,
    DOCUMENTS: tl.constexpr, H: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Keys low..high into dq (without 1/sqrt(H)) of one tile of queries, all of which see them below ``even``.

    With documents from ``alike`` on, and none of them before the ``start`` of each query's document.
    """
    across = tl.arange(0, H)
    for n in range(low, high, BN):
        column = n + tl.arange(0, BN)
        k_tile = k_ptr + column[:, None] * k_stride + across[None, :]
        v_tile = v_ptr + column[:, None] * v_stride + across[None, :]
        inside = (column < keys)[:, None]
        k = tl.load(k_tile, mask=inside, other=0.0)
        v = tl.load(v_tile, mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        p = tl.exp2(s - lse[:, None])
        if DOCUMENTS:
            if (n < alike) | (n >= even):
                p = tl.where((column[None, :] <= row[:, None]) & (column[None, :] >= start[:, None]), p, 0.0)
        elif n >= even:
            p = tl.where(column[None, :] <= row[:, None], p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION) * gate
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _keys_program(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gates_ptr, slots_ptr, ends_ptr, dk_ptr, dv_ptr,
    q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
    v_stride_t, v_stride_b, v_stride_h, queries, keys, batch, heads, groups, scale, unit, b, slot, first,
    part, chunk, DOCUMENTS: tl.constexpr, SPLIT: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """dk and dv of keys first..first + BN of one group, from one part of the queries."""
    offset = keys - queries
    # The first tile of queries that sees the first key, and the first that sees all keys.
    start = tl.maximum(first - offset, 0) // BM * BM
    full = tl.cdiv(tl.maximum(first + BN - 1 - offset, 0), BM) * BM
    stop = queries
    shut = queries
    if DOCUMENTS:
        stop = last_query(ends_ptr, tl.minimum(first + BN, keys) - 1, offset, queries)
        shut = last_query(ends_ptr, first, offset, queries)
    if SPLIT:
        start, stop = tl.maximum(start, part * chunk), tl.minimum(stop, (part + 1) * chunk)
    full = tl.maximum(start, tl.minimum(full, stop))
    # Keys that no query sees are stored nowhere else, unless parts are added up.
    if (start < stop) | (DOCUMENTS and not SPLIT):
        _keys_tile(
            q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gates_ptr, slots_ptr, ends_ptr, dk_ptr, dv_ptr,
            q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
            v_stride_t, v_stride_b, v_stride_h, queries, keys, batch, heads, groups, scale, unit, b, slot, first,
            start, full, shut, stop, DOCUMENTS, H, BM, BN, PRECISION
        )  # fmt: skip


@triton.jit
def _keys_tile(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gates_ptr, slots_ptr, ends_ptr, dk_ptr, dv_ptr,
    q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
    v_stride_t, v_stride_b, v_stride_h, queries, keys, batch, heads, groups, scale, unit, b, slot, first,
    start, full, shut, stop,
    DOCUMENTS: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """dk and dv of one tile of keys from queries start..stop, which see all of them from ``full`` to ``shut``.

    Axis 0 is the group of one sequence, axis 2 the part, see ``attend_backward_kernel``.
    """
    column, across = first + tl.arange(0, BN), tl.arange(0, H)
    inside = (column < keys)[:, None]
    k_base = k_ptr + b * k_stride_b + slot * k_stride_h
    v_base = v_ptr + b * v_stride_b + slot * v_stride_h
    k = tl.load(k_base + column[:, None] * k_stride_t + across[None, :], mask=inside, other=0.0)
    v = tl.load(v_base + column[:, None] * v_stride_t + across[None, :], mask=inside, other=0.0)
    dk, dv = tl.zeros([BN, H], tl.float32), tl.zeros([BN, H], tl.float32)
    offset = keys - queries
    end = column
    if DOCUMENTS:
        end = tl.load(ends_ptr + column, mask=column < keys, other=0)
    for head in range(heads):
        mine = tl.load(slots_ptr + head) == slot
        gate = tl.load(gates_ptr + head)
        pair = b * heads + head
        q_base = q_ptr + b * q_stride_b + head * q_stride_h
        do_base = do_ptr + pair * H
        lse_base, delta_base = lse_ptr + pair * queries, delta_ptr + pair * queries
        stride = batch * heads * H
        dk, dv = _key_side(
            k, v, q_base, do_base, lse_base, delta_base, q_stride_t, stride, gate, column, end, start,
            tl.where(mine, stop, start), offset, queries, full, shut, dk, dv, scale, DOCUMENTS, H, BM, PRECISION
        )  # fmt: skip
    # The program ids are read again, not kept: the loop uses all registers.
    corner = (tl.program_id(2) * keys * batch * groups + tl.program_id(0)) * H
    dk_ptr += corner
    dv_ptr += corner
    place = column[:, None] * (batch * groups * H) + across[None, :]
    tl.store(dk_ptr + place, (dk * unit).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _queries_program(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gates_ptr, slots_ptr, starts_ptr, dq_ptr,
    q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
    v_stride_t, v_stride_b, v_stride_h, queries, keys, batch, heads, scale, unit, b, head, first,
    part, chunk, DOCUMENTS: tl.constexpr, SPLIT: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """dq of queries first..first + BM of one head, from one part of the keys."""
    offset = keys - queries
    low, high, alike = 0, tl.minimum(keys, offset + first + BM), 0
    if DOCUMENTS:
        low = tl.load(starts_ptr + offset + first) // BN * BN
        alike = tl.load(starts_ptr + offset + tl.minimum(first + BM, queries) - 1)
    if SPLIT:
        low, high = tl.maximum(low, part * chunk), tl.minimum(high, (part + 1) * chunk)
    # Below `even` every key is seen by every query of the tile.
    even = tl.maximum(low, tl.minimum(high, (offset + first + 1) // BN * BN))
    if low < high:
        _queries_tile(
            q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gates_ptr, slots_ptr, starts_ptr, dq_ptr,
            q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
            v_stride_t, v_stride_b, v_stride_h, queries, keys, batch, heads, scale, unit, b, head, first,
            part, low, alike, even, high, DOCUMENTS, H, BM, BN, PRECISION
        )  # fmt: skip


@triton.jit
def _queries_tile(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gates_ptr, slots_ptr, starts_ptr, dq_ptr,
    q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
    v_stride_t, v_stride_b, v_stride_h, queries, keys, batch, heads, scale, unit, b, head, first,
    part, low, alike, even, high,
    DOCUMENTS: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """dq of one tile of queries from keys low..high, of which it sees all from ``alike`` to ``even``."""
    query, across = first + tl.arange(0, BM), tl.arange(0, H)
    live = query < queries
    pair = b * heads + head
    q_base = q_ptr + b * q_stride_b + head * q_stride_h
    q = tl.load(q_base + query[:, None] * q_stride_t + across[None, :], mask=live[:, None], other=0.0)
    place = pair * H + query[:, None] * (batch * heads * H) + across[None, :]
    do = tl.load(do_ptr + place, mask=live[:, None], other=0.0)
    lse = tl.load(lse_ptr + pair * queries + query, mask=live, other=0.0)
    delta = tl.load(delta_ptr + pair * queries + query, mask=live, other=0.0)
    slot, gate = tl.load(slots_ptr + head), tl.load(gates_ptr + head)
    k_base = k_ptr + b * k_stride_b + slot * k_stride_h
    v_base = v_ptr + b * v_stride_b + slot * v_stride_h
    row = keys - queries + query
    start = row
    if DOCUMENTS:
        start = tl.load(starts_ptr + row, mask=live, other=0)
    dq = tl.zeros([BM, H], tl.float32)
    dq = _query_side(
        q, do, lse, delta, k_base, v_base, k_stride_t, v_stride_t, gate, row, start, low, alike, even, high, keys, dq,
        scale, DOCUMENTS, H, BN, PRECISION
    )  # fmt: skip
    target = dq_ptr + part * (queries * batch * heads * H)
    tl.store(target + place, (dq * unit).to(dq_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit
def attend_backward_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gates_ptr, slots_ptr, starts_ptr, ends_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
    v_stride_t, v_stride_b, v_stride_h, queries, keys, positions, batch, heads, groups, scale, unit, chunk,
    DOCUMENTS: tl.constexpr, SPLIT: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """Tile number axis 1, counted from the longest, of one group's keys or one head's queries (axis 0).

    ``SPLIT``: axis 2 is the part that is summed over, and gradients are fp32, [parts, *] each.
    """
    index, rank, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_programs = batch * groups
    if index < key_programs:
        if rank * BN < keys:
            _keys_program(
                q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gates_ptr, slots_ptr,
                ends_ptr + index // groups * positions, dk_ptr, dv_ptr,
                q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
                v_stride_t, v_stride_b, v_stride_h, queries, keys, batch, heads, groups, scale, unit,
                index // groups, index % groups, rank * BN, part, chunk, DOCUMENTS, SPLIT, H, BM, BN, PRECISION
            )  # fmt: skip
    else:
        first = (tl.cdiv(queries, BM) - 1 - rank) * BM
        if first >= 0:
            pair = index - key_programs
            _queries_program(
                q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gates_ptr, slots_ptr,
                starts_ptr + pair // heads * positions, dq_ptr,
                q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
                v_stride_t, v_stride_b, v_stride_h, queries, keys, batch, heads, scale, unit,
                pair // heads, pair % heads, first, part, chunk, DOCUMENTS, SPLIT, H, BM, BN, PRECISION
            )  # fmt: skip


def attend_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    gates: Tensor,
    slots: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``loop_attention.attend_backward``; dout, out, lse, starts and ends are contiguous."""
    queries, batch, heads, size = query.shape
    keys, _, groups, _ = key.shape
    dq = query.new_empty(queries, batch, heads, size)
    dk, dv = (key.new_empty(keys, batch, groups, size) for _ in range(2))
    delta = torch.empty_like(lse)
    shape, launch = tile("attend_backward", query, size)
    delta_kernel[(batch * heads, triton.cdiv(queries, 64))](
        dout, out, delta, queries, batch, heads, H=size, BM=64, num_warps=4
    )
    unit = 1.0 / math.sqrt(size)
    tiles = max(triton.cdiv(keys, shape["BN"]), triton.cdiv(queries, shape["BM"]))
    chunk = split_keys(query, keys, batch * (groups + heads) * tiles, BACKWARD_PART)
    parts = triton.cdiv(keys, chunk)
    check_addresses(query, key, value, factor=parts)
    check_addresses(key, factor=parts)
    documented = starts is not None
    begins, stops, positions = (slots, slots, keys) if starts is None else (starts, ends, starts.shape[1])
    gradients = (dq, dk, dv)
    sums = gradients if parts == 1 else tuple(lse.new_empty(parts, *t.shape) for t in gradients)
    attend_backward_kernel[(batch * (groups + heads), tiles, parts)](
        query, key, value, dout, lse, delta, gates, slots, begins, stops, *sums,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        queries, keys, positions, batch, heads, groups, math.log2(math.e) * unit, unit, chunk,
        DOCUMENTS=documented, SPLIT=parts > 1, H=size, PRECISION=precision(query), **shape, **launch
    )  # fmt: skip
    if parts > 1:
        sum_parts_kernel[(batch * max(groups, heads), tiles, 3)](
            *sums, begins, stops, *gradients, queries, keys, positions, batch, heads, groups, chunk,
            DOCUMENTS=documented, H=size, **shape, num_warps=4
        )  # fmt: skip
    return dq, dk, dv
