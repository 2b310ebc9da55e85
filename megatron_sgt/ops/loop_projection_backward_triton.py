"""Backward of the projections of a loop pass in Triton; definitions and formulas in ``loop_projection.py``.

Four kernels: the product of dout with W_o's kept columns; a pass over the heads' gradients (inverse rotation, q/k
norm, c, scaling by r); the product with the kept rows of W_qkv, whose epilogue is the norm's backward and the
residual; and the step from the product of a weight gradient to the gradients of W_qkv's rows and of the norm's weight.
The products of weight gradients are the library's, made where the functions are differentiated (``fused_loop.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sgt.ops.loop_projection_triton import precision
from megatron_sgt.ops.tiles import tile


@triton.jit
def output_gradient_kernel(
    dout_ptr, weight_ptr, columns_ptr, grad_ptr, tokens, width, stride, heads, EVEN: tl.constexpr,
    H: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One head (axis 0) of one tile of tokens (axis 1)."""
    head = tl.program_id(0)
    first = (tl.program_id(1) * BM).to(tl.int64)
    local, inner, across = tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, H)
    live = (first + local < tokens)[:, None]
    d_tile = dout_ptr + first * width + local[:, None] * width + inner[None, :]
    start = tl.load(columns_ptr + head)
    w_tile = weight_ptr + start + inner[:, None] * stride + across[None, :]
    acc = tl.zeros([BM, H], tl.float32)
    for k in range(0, width, BK):
        if EVEN:
            d = tl.load(d_tile + k, mask=live, other=0.0)
            w = tl.load(w_tile)
        else:
            inside = k + inner < width
            d = tl.load(d_tile + k, mask=live & inside[None, :], other=0.0)
            w = tl.load(w_tile, mask=inside[:, None], other=0.0)
        acc = tl.dot(d, w, acc, input_precision=PRECISION)
        w_tile += BK * stride
    place = first * (heads * H) + head * H + local[:, None] * (heads * H) + across[None, :]
    tl.store(grad_ptr + place, acc.to(grad_ptr.dtype.element_ty), mask=live)


@triton.jit
def _turn_back(first, second, cos, sin):
    """Inverse rotation of two halves."""
    return first * cos + second * sin, second * cos - first * sin


@triton.jit
def _norm_back(d1, d2, u1, u2, gain_ptrs, H: tl.constexpr, eps):
    """Backward of the norm of two halves: their gradients, and the weight's summed over the rows."""
    inverse = tl.rsqrt((tl.sum(u1 * u1, 1) + tl.sum(u2 * u2, 1)) / H + eps)[:, None]
    hat1, hat2 = u1 * inverse, u2 * inverse
    sum1, sum2 = tl.sum(d1 * hat1, 0), tl.sum(d2 * hat2, 0)
    d1 = d1 * tl.load(gain_ptrs).to(tl.float32)[None, :]
    d2 = d2 * tl.load(gain_ptrs + H // 2).to(tl.float32)[None, :]
    mean = ((tl.sum(d1 * hat1, 1) + tl.sum(d2 * hat2, 1)) / H)[:, None]
    return inverse * (d1 - hat1 * mean), inverse * (d2 - hat2 * mean), sum1, sum2


@triton.jit
def head_gradients_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, before_ptr, r_ptr, bias_ptr, rows_ptr, cos_ptr, sin_ptr, q_norm_ptr,
    k_norm_ptr, scaled_ptr, coefficient_ptr, dnorm_ptr, tokens, repeat, width, heads, groups, eps,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, H: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """All head blocks of one tile of tokens, of which ``repeat`` share a row of cos and sin; of dnorm a row each."""
    HALF: tl.constexpr = H // 2
    first, local, half = tl.program_id(0) * BM, tl.arange(0, BM)[:, None], tl.arange(0, HALF)
    token = first + tl.arange(0, BM)
    live = (token < tokens)[:, None]
    angle = (token // repeat)[:, None] * HALF + half[None, :]
    cos = tl.load(cos_ptr + angle, mask=live, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=live, other=0.0)
    r = tl.load(r_ptr + token, mask=token < tokens, other=0.0)
    c = tl.zeros([BM], tl.float32)
    wide_first = first.to(tl.int64)
    row, normed_row = (heads + 2 * groups) * H, (heads + groups) * H
    for kind in tl.static_range(3):
        count = heads if kind == 0 else groups
        offset = 0 if kind == 0 else heads + (kind - 1) * groups
        grad_ptr = dq_ptr if kind == 0 else (dk_ptr if kind == 1 else dv_ptr)
        gain_ptr = q_norm_ptr if kind == 0 else k_norm_ptr
        sum1, sum2 = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
        for i in range(count):
            grad = grad_ptr + wide_first * (count * H) + i * H + local * (count * H) + half[None, :]
            d1 = tl.load(grad, mask=live, other=0.0).to(tl.float32)
            d2 = tl.load(grad + HALF, mask=live, other=0.0).to(tl.float32)
            corner, place = wide_first * row + (offset + i) * H, local * row + half[None, :]
            if HAS_NORM and kind < 2:
                d1, d2 = _turn_back(d1, d2, cos, sin)
                kept = before_ptr + wide_first * normed_row + (offset + i) * H
                kept += local * normed_row + half[None, :]
                u1 = tl.load(kept, mask=live, other=0.0).to(tl.float32)
                u2 = tl.load(kept + HALF, mask=live, other=0.0).to(tl.float32)
                d1, d2, more1, more2 = _norm_back(d1, d2, u1, u2, gain_ptr + half, H, eps)
                sum1, sum2 = sum1 + more1, sum2 + more2
                c += tl.sum(d1 * u1, 1) + tl.sum(d2 * u2, 1)
            else:
                u1 = tl.load(qkv_ptr + corner + place, mask=live, other=0.0).to(tl.float32)
                u2 = tl.load(qkv_ptr + corner + place + HALF, mask=live, other=0.0).to(tl.float32)
                c += tl.sum(d1 * u1, 1) + tl.sum(d2 * u2, 1)  # rotations keep products
                if kind < 2:
                    d1, d2 = _turn_back(d1, d2, cos, sin)
            if HAS_BIAS:
                bias = bias_ptr + tl.load(rows_ptr + offset + i) + half
                b1, b2 = tl.load(bias).to(tl.float32), tl.load(bias + HALF).to(tl.float32)
                c -= tl.sum(d1 * b1[None, :], 1) + tl.sum(d2 * b2[None, :], 1)
            tl.store(scaled_ptr + corner + place, (d1 * r[:, None]).to(scaled_ptr.dtype.element_ty), mask=live)
            tl.store(
                scaled_ptr + corner + place + HALF,
                (d2 * r[:, None]).to(scaled_ptr.dtype.element_ty),
                mask=live,
            )
        if HAS_NORM and kind < 2:
            partial = dnorm_ptr + (tl.program_id(0) * 2 + kind) * H + half
            tl.store(partial, sum1)
            tl.store(partial + HALF, sum2)
    tl.store(coefficient_ptr + token, r * r * c / width, mask=token < tokens)


@triton.jit
def input_gradient_kernel(
    scaled_ptr, coefficient_ptr, x_ptr, dout_ptr, norm_ptr, weight_ptr, rows_ptr, dx_ptr, tokens, width,
    count, HAS_RESIDUAL: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """A tile of BN inputs (axis 0) for BM tokens (axis 1)."""
    left, first = tl.program_id(0) * BN, (tl.program_id(1) * BM).to(tl.int64)
    across, local, inner = tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, BK)
    live, inside = (first + local < tokens)[:, None], left + across < width
    d_tile = scaled_ptr + first * (count * H) + local[:, None] * (count * H) + inner[None, :]
    w_tile = weight_ptr + left + inner[:, None] * width + across[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for block in range(count):
        start = tl.load(rows_ptr + block).to(tl.int64)
        for k in tl.static_range(0, H, BK):
            d = tl.load(d_tile + block * H + k, mask=live, other=0.0)
            w = tl.load(w_tile + (start + k) * width, mask=inside[None, :], other=0.0)
            acc = tl.dot(d, w, acc, input_precision=PRECISION)
    corner = first * width + left
    place = local[:, None] * width + across[None, :]
    mask = live & inside[None, :]
    x = tl.load(x_ptr + corner + place, mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(norm_ptr + left + across, mask=inside, other=0.0).to(tl.float32)
    coefficient = tl.load(coefficient_ptr + first + local, mask=first + local < tokens, other=0.0)
    dx = acc * gain[None, :] - x * coefficient[:, None]
    if HAS_RESIDUAL:
        dx += tl.load(dout_ptr + corner + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + corner + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_weight_gradient_kernel(
    product_ptr, norm_ptr, weight_ptr, rows_ptr, target_ptr, part_ptr, width, ADD: tl.constexpr,
    H: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """BN inputs (axis 0) of the H rows of one block (axis 1), whose share of the norm's gradient is a row of parts."""
    across, local = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, H)
    block = tl.program_id(1)
    inside = across < width
    mask = inside[None, :]
    gain = tl.load(norm_ptr + across, mask=inside, other=0.0).to(tl.float32)[None, :]
    tile = local[:, None] * width + across[None, :]
    place = tl.load(rows_ptr + block).to(tl.int64) * width + tile
    product = tl.load(product_ptr + block * H * width + tile, mask=mask, other=0.0)
    w = tl.load(weight_ptr + place, mask=mask, other=0.0).to(tl.float32)
    value = product * gain
    if ADD:
        value += tl.load(target_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(target_ptr + place, value.to(target_ptr.dtype.element_ty), mask=mask)
    tl.store(part_ptr + block * width + across, tl.sum(product * w, 0), mask=inside)


def norm_weight_gradient(
    product: Tensor, norm_weight: Tensor, weight: Tensor, rows: Tensor, target: Tensor, add: bool
) -> Tensor:
    """As ``loop_projection.norm_weight_gradient``; all tensors are contiguous."""
    blocks, width = len(rows), product.shape[1]
    parts = product.new_empty(blocks, width)
    norm_weight_gradient_kernel[(triton.cdiv(width, 32), blocks)](
        product, norm_weight, weight, rows, target, parts, width, ADD=add, H=product.shape[0] // blocks, BN=32,
        num_warps=4
    )  # fmt: skip
    return parts.sum(0)


def output_gradient(dout: Tensor, weight: Tensor, columns: Tensor, size: int) -> Tensor:
    """As ``loop_projection.output_gradient``; dout and the rows of weight are contiguous."""
    length, batch, width = dout.shape
    tokens, heads = length * batch, len(columns)
    grad = dout.new_empty(length, batch, heads, size)
    shape, launch = tile("output_gradient", dout, size)
    output_gradient_kernel[(heads, triton.cdiv(tokens, shape["BM"]))](
        dout, weight, columns, grad, tokens, width, weight.stride(0), heads, EVEN=width % shape["BK"] == 0,
        H=size, PRECISION=precision(dout), **shape, **launch
    )  # fmt: skip
    return grad


def head_gradients(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    before: Tensor,
    r: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``loop_projection.head_gradients``; all tensors are contiguous."""
    length, batch, heads, size = dq.shape
    tokens, groups = length * batch, dk.shape[2]
    scaled, coefficient = torch.empty_like(qkv), torch.empty_like(r)
    shape, launch = tile("head_gradients", dq, size)
    programs = triton.cdiv(tokens, shape["BM"])
    normed, repeat = q_norm is not None, batch if cos.dim() == 2 else 1
    partial = r.new_empty((programs, 2, size) if normed else 0)
    head_gradients_kernel[(programs,)](
        dq, dk, dv, qkv, before, r, dq if bias is None else bias, rows, cos, sin, dq if q_norm is None else
        q_norm, dq if k_norm is None else k_norm, scaled, coefficient, partial, tokens, repeat, width, heads,
        groups, eps, HAS_BIAS=bias is not None, HAS_NORM=normed, H=size, **shape, **launch
    )  # fmt: skip
    return scaled, coefficient, partial.sum(0) if normed else partial


def input_gradient(
    scaled: Tensor,
    coefficient: Tensor,
    x: Tensor,
    dout: Tensor | None,
    norm_weight: Tensor,
    weight: Tensor,
    rows: Tensor,
) -> Tensor:
    """As ``loop_projection.input_gradient``; all tensors are contiguous."""
    length, batch, width = x.shape
    tokens, size = length * batch, scaled.shape[-1]
    dx = torch.empty_like(x)
    shape, launch = tile("input_gradient", x, size)
    input_gradient_kernel[(triton.cdiv(width, shape["BN"]), triton.cdiv(tokens, shape["BM"]))](
        scaled, coefficient, x, x if dout is None else dout, norm_weight, weight, rows, dx, tokens, width,
        len(rows), HAS_RESIDUAL=dout is not None, H=size, PRECISION=precision(x), **shape, **launch
    )  # fmt: skip
    return dx
