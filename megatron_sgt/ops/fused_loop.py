"""A loop pass as three differentiable functions: project in, attend, project out (formulas: ``loop_projection.py``).

``project_in`` also returns its input as the residual: in the backward pass the residual's gradient arrives there as
``dout`` and is added where dx is written, instead of in another pass over [S, B, D].

Weight gradients are two library products of the size of the kept rows. Where a parameter has a ``main_grad``
buffer (Megatron's distributed optimizer) they are added into its rows and autograd gets None; else (DeepSpeed)
autograd gets the dense gradient. Under activation recompute the functions run a second time in the backward pass
and save what they need then; they draw no random numbers.

Legend as in ``loop_projection.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_sgt.ops import operators
from megatron_sgt.ops.documents import Documents
from megatron_sgt.ops.head_blocks import HeadBlocks
from megatron_sgt.ops.rotary import Rotary


def project_in(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head_norms: tuple[Tensor, Tensor] | None,
    blocks: HeadBlocks,
    rotary: Rotary,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm, kept projections, q/k norm and rotation.

    Args:
        x: [S, B, D]. norm_weight: [D]. weight: [*, D], bias: [*]. head_norms: weights [H] of the q and k norms.

    Returns:
        query [S, B, h, H], key and value [S, B, g, H], and x itself, to be passed to ``project_out`` as its
        residual.
    """
    q_norm, k_norm = (None, None) if head_norms is None else head_norms
    return _ProjectIn.apply(x, norm_weight, weight, bias, q_norm, k_norm, blocks, rotary, eps)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: HeadBlocks,
    entropy: bool,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated causal attention from the last positions: (out [Q, B, h, H], row entropies [B, h, Q] or empty).

    ``documents``: those of K positions at least, which attention then never leaves.
    """
    starts, ends = (None, None) if documents is None else (documents.starts, documents.ends)
    out, _, rows = operators.attend(query, key, value, blocks.gates, blocks.slots, entropy, starts, ends)
    return out, rows


def project_out(heads: Tensor, residual: Tensor | None, weight: Tensor, blocks: HeadBlocks) -> Tensor:
    """residual + kept heads [S, B, h, H] through their columns of weight [D, *] -> [S, B, D]."""
    return _ProjectOut.apply(heads, residual, weight, blocks)


class _ProjectIn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None,
        q_norm: Tensor | None, k_norm: Tensor | None, blocks: HeadBlocks, rotary: Rotary, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        qkv, r, before = operators.project_in(
            x,
            norm_weight,
            weight,
            bias,
            blocks.rows,
            rotary.cos,
            rotary.sin,
            q_norm,
            k_norm,
            eps,
            blocks.heads,
        )
        ctx.save_for_backward(x, norm_weight, weight, bias, q_norm, k_norm, qkv, r, before)
        ctx.blocks, ctx.rotary, ctx.eps = blocks, rotary, eps
        ctx.set_materialize_grads(False)  # without a residual there is no dout
        query, key, value = qkv.split([blocks.heads, blocks.groups, blocks.groups], dim=2)
        return query, key, value, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor | None) -> tuple[Any, ...]:
        x, norm_weight, weight, bias, q_norm, k_norm, qkv, r, before = ctx.saved_tensors
        blocks, rotary = ctx.blocks, ctx.rotary
        scaled, coefficient, dnorm = operators.head_gradients(
            dq, dk, dv, qkv, before, r, bias, blocks.rows, rotary.cos, rotary.sin, q_norm, k_norm,
            ctx.eps, x.shape[-1],
        )  # fmt: skip
        dx = operators.input_gradient(scaled, coefficient, x, dout, norm_weight, weight, blocks.rows)
        flat = scaled.flatten(0, 1).flatten(1)
        product = weight_product(flat, x.flatten(0, 1), r.dtype)
        dweight, dgain = qkv_gradient(product, norm_weight, weight, blocks)
        dbias = None
        if bias is not None:
            unscaled = flat.to(r.dtype).t() @ r.flatten().reciprocal()
            dbias = into_parameter(bias, unscaled, blocks.row_index, blocks, 0)
        normed = (None, None) if q_norm is None else (dnorm[0].to(q_norm.dtype), dnorm[1].to(k_norm.dtype))
        return dx, _whole(norm_weight, dgain), dweight, dbias, *normed, None, None, None


class _ProjectOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, residual: Tensor | None, weight: Tensor, blocks: HeadBlocks) -> Tensor:
        ctx.save_for_backward(heads, weight)
        ctx.blocks, ctx.with_residual = blocks, residual is not None
        return operators.project_out(heads, residual, weight, blocks.columns)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        heads, weight = ctx.saved_tensors
        blocks = ctx.blocks
        dout = dout.contiguous()
        dheads = operators.output_gradient(dout, weight, blocks.columns, blocks.size)
        main = getattr(weight, "main_grad", None)
        wide = (weight if main is None else main).dtype
        product = weight_product(dout.flatten(0, 1), heads.flatten(0, 1).flatten(1), wide)
        dweight = into_parameter(weight, product, blocks.column_index, blocks, 1)
        return dheads, (dout if ctx.with_residual else None), dweight, None


def weight_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """aᵀ b in ``dtype``; a and b [N, *]. Summed as every weight gradient of a linear layer, in fp32 on a CPU."""
    if a.dtype == dtype:
        # Half types on a CPU would sum in their own precision.
        half_on_cpu = a.device.type == "cpu" and dtype.itemsize == 2
        return torch.mm(a.t().float(), b.float()).to(dtype) if half_on_cpu else torch.mm(a.t(), b)
    # torch 2.8 and later, only on Nvidia's GPUs: operands of a half type, products in fp32.
    cublas = a.device.type == "cuda" and torch.version.hip is None
    if cublas and dtype == torch.float32 and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a.t(), b, out_dtype=dtype)
    return torch.mm(a.t().to(dtype), b.to(dtype))


def qkv_gradient(
    product: Tensor, norm_weight: Tensor, weight: Tensor, blocks: HeadBlocks
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the fused projection (None: it went into ``main_grad``) and of the norm's weight, fp32.

    Raises:
        ValueError: ``main_grad`` is not contiguous; the kernel would write into a copy.
    """
    main = getattr(weight, "main_grad", None)
    if main is not None:
        if not main.is_contiguous():
            raise ValueError(f"main_grad of a looped projection must be contiguous, has strides {main.stride()}")
        return None, operators.norm_weight_gradient(product, norm_weight, weight, blocks.rows, main, True)
    fill = torch.empty_like if blocks.whole else torch.zeros_like
    target = fill(weight, memory_format=torch.contiguous_format)
    return target, operators.norm_weight_gradient(product, norm_weight, weight, blocks.rows, target, False)


def into_parameter(parameter: Tensor, part: Tensor, index: Tensor, blocks: HeadBlocks, dim: int) -> Tensor | None:
    """The gradient of ``parameter`` that is ``part`` at ``index`` along ``dim`` (None: it went into ``main_grad``)."""
    if blocks.whole:
        return part.to(parameter.dtype)
    main = getattr(parameter, "main_grad", None)
    if main is not None:
        main.index_add_(dim, index, part.to(main.dtype))
        return None
    return torch.zeros_like(parameter).index_copy_(dim, index, part.to(parameter.dtype))


def _whole(parameter: Tensor, gradient: Tensor) -> Tensor | None:
    main = getattr(parameter, "main_grad", None)
    if main is not None:
        main.add_(gradient.to(main.dtype))
        return None
    return gradient.to(parameter.dtype)
