"""One loop pass on tensors alone, in the ways that are compared: plain torch, and fused with either attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.ops import fused_loop
from megatron_sgt.ops.attention import causal_attention
from megatron_sgt.ops.head_blocks import HeadBlocks, head_blocks
from megatron_sgt.ops.rotary import Rotary, rotary_table
from megatron_sgt.parallel.packed_copy import on_device

EPS = 1e-6


@dataclass
class PassInputs:
    """x [S, B, D] and the weights of a layer; two kept heads."""

    x: Tensor
    norm_weight: Tensor
    qkv_weight: Tensor
    out_weight: Tensor
    rotary: Rotary
    blocks: HeadBlocks
    size: int

    def leaves(self) -> list[Tensor]:
        """What has gradients."""
        return [self.x, self.norm_weight, self.qkv_weight, self.out_weight]


def pass_inputs(
    length: int, batch: int, width: int, size: int, device: torch.device, dtype: torch.dtype, kept: int = 2
) -> PassInputs:
    """Random inputs of order 1; kept heads lie in different groups."""
    torch.manual_seed(0)
    heads = width // size
    blocks = head_blocks(HeadLayout(heads, heads, size), range(0, heads, max(1, heads // kept))[:kept])

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=device)).to(dtype).requires_grad_()

    frequencies = 10000.0 ** (-torch.arange(0, 1, 2 / size, device=device))
    angles = torch.arange(length, device=device).outer(frequencies)
    return PassInputs(
        x=leaf(length, batch, width),
        norm_weight=torch.ones(width, device=device, dtype=dtype).requires_grad_(),
        qkv_weight=leaf(3 * width, width, scale=width**-0.5),
        out_weight=leaf(width, width, scale=width**-0.5),
        rotary=rotary_table(torch.cat([angles, angles], dim=-1)[:, None, None]),
        blocks=on_device(blocks, device),
        size=size,
    )


def eager_rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Rotary positions as Megatron-Core puts them on, operation by operation."""
    cos, sin = (torch.cat([t, t], dim=-1).to(heads.dtype)[:, None, None] for t in (rotary.cos, rotary.sin))
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def eager_pass(p: PassInputs) -> Tensor:
    """Operation by operation, as ``model.head_loop.SparseLoop``; also what torch.compile is given."""
    heads = p.blocks.heads
    normed = F.rms_norm(p.x, (p.x.shape[-1],), p.norm_weight, EPS)
    fused = F.linear(normed, p.qkv_weight[p.blocks.row_index]).unflatten(-1, (3 * heads, p.size))
    query, key, value = fused.split([heads, heads, heads], dim=2)
    out = causal_attention(eager_rotate(query, p.rotary), eager_rotate(key, p.rotary), value)
    return p.x + F.linear(out.flatten(2), p.out_weight[:, p.blocks.column_index])


def fused_pass(p: PassInputs, library: bool) -> Tensor:
    """The fused projections with the library's attention or the custom one."""
    query, key, value, residual = fused_loop.project_in(
        p.x, p.norm_weight, p.qkv_weight, None, None, p.blocks, p.rotary, EPS
    )
    if library:
        out = causal_attention(query, key, value)
    else:
        out, _ = fused_loop.attend(query, key, value, p.blocks, False)
    return fused_loop.project_out(out, residual, p.out_weight, p.blocks)


def work(length: int, batch: int, width: int, size: int, kept: int = 2, bytes_per: int = 2) -> tuple[float, float]:
    """(operations, bytes at least) of forward and backward of one pass; causal attention counts half."""
    tokens = length * batch
    projections = 2.0 * tokens * width * 4 * kept * size
    attention = attention_flops(length, batch, size, kept)
    # Forward reads x and writes the output; backward reads x and dout and writes dx; dW_o reads dout once more.
    return 3 * projections + attention * 3.5, 6.0 * tokens * width * bytes_per


def attention_flops(length: int, batch: int, size: int, kept: int = 2) -> float:
    """Operations of the forward of causal attention; its backward has 2.5 times as many."""
    return 4.0 * batch * kept * length * length * size / 2
