"""Causal attention of the kept heads with gates and row entropies, as definitions, forward and backward.

With the probabilities p of causal attention (its scores: ``attention.causal_scores``)

    o_i = γ Σ_j p_ij v_j      e_i = − Σ_j p_ij ln p_ij
    δ_i = do_i · o_i      ds_ij = p_ij (γ do_i · v_j − δ_i) / sqrt(H)      dv = γ pᵀ do      dq = ds k      dk = dsᵀ q

with a gate γ per head, and o the gated output: nothing is divided by a gate, which may be 0. Queries are the last
Q of K positions (Q < K for a rank that holds a share of the tokens). ``slots[i]`` is the key/value group of head i.
Neither gates nor entropies have gradients: gates follow the schedule. With ``starts`` and ``ends`` [B, K at least]
int32, those of ``documents.Documents``, a query looks at its own document alone; both are given or neither. The GPU
versions are in ``loop_attention_triton.py`` and ``loop_attention_backward_triton.py``; they never hold a score matrix.

Legend: Q queries, K keys, B batch, h heads, g groups, H head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_sgt.ops.attention import scores_within


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
    """Gated attention.

    Args:
        query: [Q, B, h, H]. key, value: [K, B, g, H] with K >= Q. Any strides whose last is 1.
        gates: [h] fp32. slots: [h] int32.
        entropy: whether to compute row entropies.

    Returns:
        o [Q, B, h, H] contiguous; the base-2 logarithm of the sum of exponentials [B, h, Q] fp32;
        e [B, h, Q] fp32 in nats, or an empty tensor.
    """
    scores, v = _scores(query, key, slots, starts), _wide(value)[:, :, slots.long()]
    lse = scores.logsumexp(-1)
    p = (scores - lse.unsqueeze(-1)).exp()
    out = torch.einsum("bnij,jbnh->ibnh", p, v) * gates.to(p)[:, None]
    # x ln x is 0 at 0: a masked position's probability is 0, its logarithm -inf.
    rows = torch.special.entr(p).sum(-1) if entropy else p.new_empty(0)
    return out.to(query.dtype).contiguous(), lse / math.log(2.0), rows


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
    """Gradients dq [Q, B, h, H], dk and dv [K, B, g, H], contiguous, from dout [Q, B, h, H]."""
    q, k, v, do = (_wide(t) for t in (query, key, value, dout))
    k, v = k[:, :, slots.long()], v[:, :, slots.long()]
    gate = gates.to(q)[:, None, None]
    p = (_scores(query, key, slots, starts) - lse.to(q).unsqueeze(-1) * math.log(2.0)).exp()
    delta = (do * _wide(out)).sum(-1).permute(1, 2, 0)
    ds = p * (gate * torch.einsum("ibnh,jbnh->bnij", do, v) - delta.unsqueeze(-1))
    ds = ds / math.sqrt(query.shape[-1])
    dq = torch.einsum("bnij,jbnh->ibnh", ds, k)
    per_head = (torch.einsum("bnij,ibnh->jbnh", ds, q), torch.einsum("bnij,ibnh->jbnh", gate * p, do))
    dk, dv = (part.new_zeros(key.shape).index_add_(2, slots.long(), part).to(query.dtype) for part in per_head)
    return dq.to(query.dtype).contiguous(), dk, dv


def _scores(query: Tensor, key: Tensor, slots: Tensor, starts: Tensor | None) -> Tensor:
    return scores_within(_wide(query), _wide(key)[:, :, slots.long()], starts)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
