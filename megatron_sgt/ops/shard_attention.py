"""Causal attention of a shard of the queries: rank r's tokens against all tokens up to its own last one.

Queries are the last Q of K positions (definition: ``attention.py``). The keys before them are visible to every query,
the last Q causally, so the work splits into a full and a causal product whose results merge through their log-sum-exp

    l = log(e^{l1} + e^{l2}),   out = e^{l1 - l} out1 + e^{l2 - l} out2

and whose backward passes are those of flash attention with the merged ``out`` and ``l`` (as in ring attention,
arXiv 2310.01889). GPUs have a kernel that aligns the causal mask at the last key; there it is used directly.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_sgt.ops.document_attention import by_document
from megatron_sgt.ops.documents import Documents

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def shard_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None = None) -> Tensor:
    """Attend from the last positions of a sequence.

    Args:
        query: [Q, B, N, H], the last Q of K positions.
        key, value: [K, B, N, H] with K >= Q, one key head per query head.
        documents: those of K positions at least, which attention then never leaves.

    Returns:
        [Q, B, N, H].
    """
    if documents is not None:
        return by_document(shard_attention, query, key, value, documents)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    if q.shape[2] == k.shape[2]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    elif q.device.type == "cpu":
        # The CPU kernel can only align the mask at the first key; the generic path materialises the scores.
        out = _MergedAttention.apply(q.contiguous(), k.contiguous(), v.contiguous())
    else:
        out = aligned_at_the_last_key(q, k, v)
    return out.permute(2, 0, 1, 3)


def aligned_at_the_last_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """For GPUs, whose library kernels have this mask. q [B, N, Q, H], k and v [B, N, K, H] -> [B, N, Q, H]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]))


class _MergedAttention(torch.autograd.Function):
    """Full attention to the earlier keys and causal attention to the last ones, merged. [B, N, *, H]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, N, Q, H], k and v [B, N, K, H], K > Q -> [B, N, Q, H]."""
        early = k.shape[2] - q.shape[2]
        out1, l1 = _forward(q, k[:, :, :early], v[:, :, :early], 0.0, False)
        out2, l2 = _forward(q, k[:, :, early:], v[:, :, early:], 0.0, True)
        merged = torch.logaddexp(l1, l2)
        weights = ((part - merged).exp().unsqueeze(-1) for part in (l1, l2))
        out = sum(w * part for w, part in zip(weights, (out1, out2), strict=True)).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, merged)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With the merged softmax each part's backward gives its share; the query's shares add up."""
        q, k, v, out, lse = ctx.saved_tensors
        early = k.shape[2] - q.shape[2]
        grad = grad.contiguous()
        q1, k1, v1 = _backward(grad, q, k[:, :, :early], v[:, :, :early], out, lse, 0.0, False)
        q2, k2, v2 = _backward(grad, q, k[:, :, early:], v[:, :, early:], out, lse, 0.0, True)
        return q1 + q2, torch.cat([k1, k2], dim=2), torch.cat([v1, v2], dim=2)
