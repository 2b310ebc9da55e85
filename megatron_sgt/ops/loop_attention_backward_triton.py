"""Attention of the kept heads in Triton, backward; definition and formulas in ``loop_attention.py``.

One launch makes all gradients, without atomics: some programs own a tile of keys of one group (dk, dv, summed over
the heads that read the group), the others a tile of queries of one head (dq). Under causality the first tiles of
keys and the last tiles of queries are the longest; both start first.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sgt.ops.loop_attention_triton import check_addresses
from megatron_sgt.ops.loop_projection_triton import precision
from megatron_sgt.ops.tiles import tile


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
def _key_side(
    k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_stride, do_stride, gate, column, low, high, offset, queries,
    dk, dv, scale,
    H: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Queries low..high of one head into dk (without 1/sqrt(H)) and dv of one tile of keys."""
    across = tl.arange(0, H)
    for i in range(low, high, BM):
        query = i + tl.arange(0, BM)
        live = query < queries
        q = tl.load(q_ptr + query[:, None] * q_stride + across[None, :], mask=live[:, None], other=0.0)
        do = tl.load(do_ptr + query[:, None] * do_stride + across[None, :], mask=live[:, None], other=0.0)
        lse = tl.load(lse_ptr + query, mask=live, other=0.0)
        delta = tl.load(delta_ptr + query, mask=live, other=0.0)
        # Transposed, [keys, queries]: p and ds then feed the next products from registers.
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        p = tl.exp2(s - lse[None, :])
        p = tl.where(column[:, None] <= (offset + query)[None, :], p, 0.0)
        dv = tl.dot((p * gate).to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION) * gate
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _query_side(
    q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, gate, row, low, high, keys, dq, scale,
    H: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Keys low..high into dq (without 1/sqrt(H)) of one tile of queries."""
    across = tl.arange(0, H)
    for n in range(low, high, BN):
        column = n + tl.arange(0, BN)
        inside = (column < keys)[:, None]
        k = tl.load(k_ptr + column[:, None] * k_stride + across[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptr + column[:, None] * v_stride + across[None, :], mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        p = tl.exp2(s - lse[:, None])
        p = tl.where(column[None, :] <= row[:, None], p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION) * gate
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _keys_program(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gates_ptr, slots_ptr, dk_ptr, dv_ptr,
    q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
    v_stride_t, v_stride_b, v_stride_h, queries, keys, batch, heads, groups, scale, unit, b, slot, first,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """dk and dv of keys first..first + BN of one group."""
    column, across = first + tl.arange(0, BN), tl.arange(0, H)
    inside = (column < keys)[:, None]
    k_base = k_ptr + b * k_stride_b + slot * k_stride_h
    v_base = v_ptr + b * v_stride_b + slot * v_stride_h
    k = tl.load(k_base + column[:, None] * k_stride_t + across[None, :], mask=inside, other=0.0)
    v = tl.load(v_base + column[:, None] * v_stride_t + across[None, :], mask=inside, other=0.0)
    dk, dv = tl.zeros([BN, H], tl.float32), tl.zeros([BN, H], tl.float32)
    offset = keys - queries
    start = tl.maximum(first - offset, 0) // BM * BM  # the first tile of queries that sees the first key
    for head in range(heads):
        mine = tl.load(slots_ptr + head) == slot
        gate = tl.load(gates_ptr + head)
        pair = b * heads + head
        q_base = q_ptr + b * q_stride_b + head * q_stride_h
        do_base = do_ptr + pair * H
        lse_base, delta_base = lse_ptr + pair * queries, delta_ptr + pair * queries
        stride = batch * heads * H
        dk, dv = _key_side(
            k, v, q_base, do_base, lse_base, delta_base, q_stride_t, stride, gate, column, start,
            tl.where(mine, queries, start), offset, queries, dk, dv, scale, H, BM, PRECISION
        )  # fmt: skip
    place = (b * groups + slot) * H + column[:, None] * (batch * groups * H) + across[None, :]
    tl.store(dk_ptr + place, (dk * unit).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _queries_program(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gates_ptr, slots_ptr, dq_ptr,
    q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
    v_stride_t, v_stride_b, v_stride_h, queries, keys, batch, heads, scale, unit, b, head, first,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """dq of queries first..first + BM of one head."""
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
    offset = keys - queries
    row = offset + query
    high = tl.minimum(keys, offset + first + BM)
    dq = tl.zeros([BM, H], tl.float32)
    dq = _query_side(
        q, do, lse, delta, k_base, v_base, k_stride_t, v_stride_t, gate, row, 0, high, keys, dq, scale,
        H, BN, PRECISION
    )  # fmt: skip
    tl.store(dq_ptr + place, (dq * unit).to(dq_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit
def attend_backward_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gates_ptr, slots_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
    v_stride_t, v_stride_b, v_stride_h, queries, keys, batch, heads, groups, scale, unit,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Tile number axis 1, counted from the longest, of one group's keys or one head's queries (axis 0)."""
    index, rank = tl.program_id(0), tl.program_id(1)
    key_programs = batch * groups
    if index < key_programs:
        if rank * BN < keys:
            _keys_program(
                q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gates_ptr, slots_ptr, dk_ptr, dv_ptr,
                q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
                v_stride_t, v_stride_b, v_stride_h, queries, keys, batch, heads, groups, scale, unit,
                index // groups, index % groups, rank * BN, H, BM, BN, PRECISION
            )  # fmt: skip
    else:
        first = (tl.cdiv(queries, BM) - 1 - rank) * BM
        if first >= 0:
            pair = index - key_programs
            _queries_program(
                q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, gates_ptr, slots_ptr, dq_ptr,
                q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
                v_stride_t, v_stride_b, v_stride_h, queries, keys, batch, heads, scale, unit,
                pair // heads, pair % heads, first, H, BM, BN, PRECISION
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
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``loop_attention.attend_backward``; dout, out and lse are contiguous."""
    queries, batch, heads, size = query.shape
    keys, _, groups, _ = key.shape
    check_addresses(query, key, value)
    dq = query.new_empty(queries, batch, heads, size)
    dk, dv = (key.new_empty(keys, batch, groups, size) for _ in range(2))
    delta = torch.empty_like(lse)
    shape, launch = tile("attend_backward", query, size)
    delta_kernel[(batch * heads, triton.cdiv(queries, 64))](
        dout, out, delta, queries, batch, heads, H=size, BM=64, num_warps=4
    )
    unit = 1.0 / math.sqrt(size)
    tiles = max(triton.cdiv(keys, shape["BN"]), triton.cdiv(queries, shape["BM"]))
    attend_backward_kernel[(batch * (groups + heads), tiles)](
        query, key, value, dout, lse, delta, gates, slots, dq, dk, dv,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        queries, keys, batch, heads, groups, math.log2(math.e) * unit, unit,
        H=size, PRECISION=precision(query), **shape, **launch
    )  # fmt: skip
    return dq, dk, dv
