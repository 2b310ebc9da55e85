"""Projections of a loop pass, as definitions: norm and rotary folded into W_qkv, the residual into W_o.

With x [S, B, D], its reciprocal root mean square r = (mean_D x² + eps)^-1/2, the norm's weight w and the kept rows
W of the fused projection, a pass is

    u = r · (x ∘ w) Wᵀ (+ b)      q, k = R(norm(u_q)), R(norm(u_k)), v = u_v      out = x + o W_oᵀ

where R is the rotary rotation and norm the optional q/k norm. Backward, from dq, dk, dv and dout:

    du = (norm' Rᵀ dq, norm' Rᵀ dk, dv)         c = Σ_rows du (u − b)          ( = <dx̂, x̂> with x̂ = r x )
    dx = dout + w ∘ (r du W) − x · r² c / D      dW = (r du)ᵀ x ∘ w             dw = Σ_rows (r du)ᵀ x ∘ W

so no normalised copy of x is ever stored, and the norm's backward is an epilogue of the product with W.

Kept rows and columns are read where they are: ``rows[j]`` is the first row of block j of the fused weight (h query
blocks, then g key and g value blocks, H rows each), ``columns[i]`` the first column of head i in W_o.

Legend: S sequence, B batch, D hidden, h kept heads, g kept groups, H head size. Everything is computed in fp32
(fp64 for fp64 tensors) and rounded once. The GPU versions are in ``loop_projection_triton.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sgt.ops.rotary import rotate


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
    """Kept queries, keys and values of a loop pass.

    Args:
        x: [S, B, D]. norm_weight: [D]. weight: [*, D] and bias: [*], the fused projection.
        rows: [h + 2g] int32. cos, sin: [S, H / 2] or [S, B, H / 2] fp32, of the rotary angles.
        q_norm, k_norm: [H], both or neither. eps: of all norms. heads: h.

    Returns:
        q, k, v together [S, B, h + 2g, H]; r [S, B] fp32; queries and keys before their norm
        [S, B, h + g, H], or an empty tensor without q/k norm.
    """
    size = 2 * cos.shape[-1]
    groups = (len(rows) - heads) // 2
    wide = _wide(x)
    r = (wide.square().mean(-1) + eps).rsqrt()
    u = r.unsqueeze(-1) * ((wide * norm_weight.to(wide)) @ blocks(weight, rows, size).to(wide).t())
    if bias is not None:
        u = u + blocks(bias, rows, size).to(wide)
    u = u.unflatten(-1, (-1, size))
    before, value = u.split([heads + groups, groups], dim=2)
    query, key = before.split([heads, groups], dim=2)
    if q_norm is not None and k_norm is not None:
        query, key = (_norm(t, eps) * w.to(wide) for t, w in ((query, q_norm), (key, k_norm)))
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    kept = before.to(x.dtype).contiguous() if q_norm is not None else x.new_empty(0)
    return torch.cat([query, key, value], dim=2).to(x.dtype), r, kept


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
    """From gradients of rotated heads to those of the projection.

    Args:
        dq: [S, B, h, H]. dk, dv: [S, B, g, H]. qkv, before, r: what ``project_in`` returned. width: D.

    Returns:
        r · du [S, B, h + 2g, H]; r² c / D [S, B] fp32; gradients of both norm weights [2, H] fp32, or an empty
        tensor without q/k norm.
    """
    heads, groups, size = dq.shape[2], dk.shape[2], dq.shape[3]
    dq, dk, dv, u = _wide(dq), _wide(dk), _wide(dv), _wide(qkv)
    turned_q, turned_k = dq, dk
    dq, dk = rotate(dq, cos, -sin), rotate(dk, cos, -sin)
    dnorm = dq.new_empty(0)
    if q_norm is not None and k_norm is not None:
        raw_q, raw_k = _wide(before).split([heads, groups], dim=2)
        dq, dq_norm = _norm_backward(dq, raw_q, q_norm, eps)
        dk, dk_norm = _norm_backward(dk, raw_k, k_norm, eps)
        dnorm = torch.stack([dq_norm, dk_norm])
        du = torch.cat([dq, dk, dv], dim=2)
        c = (du * torch.cat([raw_q, raw_k, u[:, :, heads + groups :]], dim=2)).sum((-1, -2))
    else:
        # Of the rotated: a product with the rotation's gradient is the product before it, whatever its scale.
        c = (torch.cat([turned_q, turned_k, dv], dim=2) * u).sum((-1, -2))
        du = torch.cat([dq, dk, dv], dim=2)
    if bias is not None:
        c = c - (du * blocks(bias, rows, size).to(du).view(-1, size)).sum((-1, -2))
    scale = r.unsqueeze(-1).unsqueeze(-1)
    return (scale * du).to(qkv.dtype), r.square() * c / width, dnorm


def input_gradient(
    scaled: Tensor,
    coefficient: Tensor,
    x: Tensor,
    dout: Tensor | None,
    norm_weight: Tensor,
    weight: Tensor,
    rows: Tensor,
) -> Tensor:
    """dx [S, B, D] from ``head_gradients``' results; ``dout``: the residual's gradient, if it is added here."""
    wide = _wide(x)
    dx = _wide(scaled).flatten(2) @ blocks(weight, rows, scaled.shape[-1]).to(wide)
    dx = dx * norm_weight.to(wide) - wide * coefficient.unsqueeze(-1)
    return (dx if dout is None else dx + dout.to(wide)).to(x.dtype)


def norm_weight_gradient(
    product: Tensor, norm_weight: Tensor, weight: Tensor, rows: Tensor, target: Tensor, add: bool
) -> Tensor:
    """From ``product`` = (r du)ᵀ x, the gradients of W's kept rows (written to ``target``) and of the norm's weight.

    Args:
        product: [(h + 2g) · H, D] fp32. norm_weight: [D]. weight: [*, D]. rows: [h + 2g] int32.
        target: [*, D] contiguous. Its kept rows become dW = product ∘ w, or with ``add`` grow by it.

    Returns:
        dw = Σ_rows product ∘ W, [D] fp32.
    """
    size = product.shape[0] // len(rows)
    index = block_indices(rows, size)
    part = product * norm_weight.to(product)
    if add:
        target.index_add_(0, index, part.to(target.dtype))
    else:
        target.index_copy_(0, index, part.to(target.dtype))
    return (product * weight[index].to(product)).sum(0)


def project_out(heads: Tensor, residual: Tensor | None, weight: Tensor, columns: Tensor) -> Tensor:
    """residual + heads W_oᵀ.

    Args:
        heads: [S, B, h, H]. residual: [S, B, D]. weight: [D, *], the output projection. columns: [h] int32.

    Returns:
        [S, B, D].
    """
    out = _wide(heads).flatten(2) @ blocks(weight.t(), columns, heads.shape[-1]).to(_wide(heads))
    return (out if residual is None else out + residual.to(out)).to(heads.dtype)


def output_gradient(dout: Tensor, weight: Tensor, columns: Tensor, size: int) -> Tensor:
    """Gradient of the heads [S, B, h, H] from that of ``project_out``'s result [S, B, D]. size: H."""
    wide = _wide(dout)
    heads = wide @ blocks(weight.t(), columns, size).to(wide).t()
    return heads.unflatten(-1, (-1, size)).to(dout.dtype)


def blocks(tensor: Tensor, starts: Tensor, size: int) -> Tensor:
    """The blocks of ``size`` indices that begin at ``starts`` along dimension 0, one after the other (a copy)."""
    return tensor[block_indices(starts, size)]


def block_indices(starts: Tensor, size: int) -> Tensor:
    """All indices [len(starts) · size] int64 of the blocks that begin at ``starts``."""
    steps = torch.arange(size, device=starts.device)
    return (starts.long().unsqueeze(-1) + steps).flatten()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _norm(x: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Backward of y = norm(x) ∘ weight over the last dimension: (dx, dweight)."""
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    hat = x * r
    dhat = dy * weight.to(dy)
    return r * (dhat - hat * (dhat * hat).mean(-1, keepdim=True)), (dy * hat).flatten(0, -2).sum(0)
