"""The forward projections of a loop pass in Triton; definitions and formulas in ``loop_projection.py``.

Each program of ``project_in`` makes one head of one tile of tokens, so the rotation and the q/k norm are done on
the accumulator. Kept rows and columns are read in place, H at a time. The norm's weight multiplies the tile of x,
which passes through registers anyway for its sum of squares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sgt.ops.tiles import tile


@triton.jit
def split_halves(t, ROWS: tl.constexpr, HALF: tl.constexpr):
    """[ROWS, 2 HALF] -> its two halves [ROWS, HALF]."""
    return tl.split(tl.permute(tl.reshape(t, [ROWS, 2, HALF]), [0, 2, 1]))


@triton.jit
def _norm_halves(first, second, gain_ptrs, H: tl.constexpr, eps):
    """RMS norm over two halves of a head, times the norm's weight."""
    inverse = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / H + eps)[:, None]
    gain1 = tl.load(gain_ptrs).to(tl.float32)[None, :]
    gain2 = tl.load(gain_ptrs + H // 2).to(tl.float32)[None, :]
    return first * inverse * gain1, second * inverse * gain2


@triton.jit
def project_in_kernel(
    x_ptr, norm_ptr, weight_ptr, bias_ptr, rows_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, qkv_ptr,
    r_ptr, before_ptr, tokens, repeat, width, heads, groups, eps, HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr, EVEN: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """One head block (axis 0) of one tile of tokens (axis 1). ``repeat``: tokens that a row of cos and sin is for."""
    HALF: tl.constexpr = H // 2
    block = tl.program_id(0)
    first = tl.program_id(1) * BM
    local = tl.arange(0, BM)
    token = first + local
    live = (token < tokens)[:, None]
    inner = tl.arange(0, BK)
    across = tl.arange(0, H)
    first_row = tl.load(rows_ptr + block)
    # Offsets of a tile are 64 bits wide once, offsets inside it 32: addresses take many registers otherwise.
    x_tile = x_ptr + first.to(tl.int64) * width + local[:, None] * width + inner[None, :]
    w_tile = weight_ptr + first_row.to(tl.int64) * width + across[:, None] * width + inner[None, :]
    acc = tl.zeros([BM, H], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for k in range(0, width, BK):
        if EVEN:
            x = tl.load(x_tile + k, mask=live, other=0.0)
            w = tl.load(w_tile + k)
            scale = tl.load(norm_ptr + k + inner)
        else:
            inside = k + inner < width
            x = tl.load(x_tile + k, mask=live & inside[None, :], other=0.0)
            w = tl.load(w_tile + k, mask=inside[None, :], other=0.0)
            scale = tl.load(norm_ptr + k + inner, mask=inside, other=0.0)
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        scaled = (wide * scale.to(tl.float32)[None, :]).to(x.dtype)
        acc = tl.dot(scaled, tl.trans(w), acc, input_precision=PRECISION)
    r = tl.rsqrt(squares / width + eps)
    acc = acc * r[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + first_row + across).to(tl.float32)[None, :]
    if block == 0:
        tl.store(r_ptr + token, r, mask=token < tokens)
    half = tl.arange(0, HALF)
    one, two = split_halves(acc, BM, HALF)
    wide_first = first.to(tl.int64)
    if block < heads + groups:
        if HAS_NORM:
            row = (heads + groups) * H
            kept = before_ptr + wide_first * row + block * H + local[:, None] * row + half[None, :]
            tl.store(kept, one.to(before_ptr.dtype.element_ty), mask=live)
            tl.store(kept + HALF, two.to(before_ptr.dtype.element_ty), mask=live)
            gain_ptr = q_norm_ptr if block < heads else k_norm_ptr
            one, two = _norm_halves(one, two, gain_ptr + half, H, eps)
        angle = (token // repeat)[:, None] * HALF + half[None, :]
        cos = tl.load(cos_ptr + angle, mask=live, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=live, other=0.0)
        one, two = one * cos - two * sin, two * cos + one * sin
    row = (heads + 2 * groups) * H
    out = qkv_ptr + wide_first * row + block * H + local[:, None] * row + half[None, :]
    tl.store(out, one.to(qkv_ptr.dtype.element_ty), mask=live)
    tl.store(out + HALF, two.to(qkv_ptr.dtype.element_ty), mask=live)


@triton.jit
def project_out_kernel(
    heads_ptr, residual_ptr, weight_ptr, columns_ptr, out_ptr, tokens, width, stride, heads,
    HAS_RESIDUAL: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """A tile of BN outputs (axis 0) for BM tokens (axis 1): residual + kept heads times their columns."""
    left, first = tl.program_id(0) * BN, (tl.program_id(1) * BM).to(tl.int64)
    across, local, inner = tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, BK)
    live, inside = (first + local < tokens)[:, None], left + across < width
    a_tile = heads_ptr + first * (heads * H) + local[:, None] * (heads * H) + inner[None, :]
    w_tile = weight_ptr + left.to(tl.int64) * stride + across[:, None] * stride + inner[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for head in range(heads):
        start = tl.load(columns_ptr + head)
        for k in tl.static_range(0, H, BK):
            a = tl.load(a_tile + head * H + k, mask=live, other=0.0)
            w = tl.load(w_tile + start + k, mask=inside[:, None], other=0.0)
            acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
    corner = first * width + left
    place = local[:, None] * width + across[None, :]
    mask = live & inside[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + corner + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + corner + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


def precision(x: Tensor) -> str:
    """tl.dot's input_precision: fp32 tensors are multiplied as fp32, not as tf32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def project_in(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``loop_projection.project_in``; x, weight, cos and sin are contiguous."""
    length, batch, width = x.shape
    size, count, tokens = 2 * cos.shape[-1], len(rows), length * batch
    groups = (count - heads) // 2
    qkv = x.new_empty(length, batch, count, size)
    r = x.new_empty(length, batch, dtype=torch.float32)
    before = x.new_empty(length, batch, heads + groups, size) if q_norm is not None else x.new_empty(0)
    shape, launch = tile("project_in", x, size)
    absent, repeat = x, batch if cos.dim() == 2 else 1
    project_in_kernel[(count, triton.cdiv(tokens, shape["BM"]))](
        x, norm_weight, weight, absent if bias is None else bias, rows, cos, sin, absent if q_norm is None
        else q_norm, absent if k_norm is None else k_norm, qkv, r, before, tokens, repeat, width, heads,
        groups, eps, HAS_BIAS=bias is not None, HAS_NORM=q_norm is not None, EVEN=width % shape["BK"] == 0,
        H=size, PRECISION=precision(x), **shape, **launch
    )  # fmt: skip
    return qkv, r, before


def project_out(heads: Tensor, residual: Tensor | None, weight: Tensor, columns: Tensor) -> Tensor:
    """As ``loop_projection.project_out``; heads, residual and the rows of weight are contiguous."""
    length, batch, count, size = heads.shape
    tokens, width = length * batch, weight.shape[0]
    out = heads.new_empty(length, batch, width)
    shape, launch = tile("project_out", heads, size)
    project_out_kernel[(triton.cdiv(width, shape["BN"]), triton.cdiv(tokens, shape["BM"]))](
        heads, heads if residual is None else residual, weight, columns, out, tokens, width,
        weight.stride(0), count, HAS_RESIDUAL=residual is not None, H=size, PRECISION=precision(heads),
        **shape, **launch
    )  # fmt: skip
    return out
