"""Attention entropy of the last query row, the measure on which growth decides.

    e[n] = mean_b ( − Σ_t p_t ln p_t ) / ln S ,   p = softmax_t( q[S-1, b, n] · k[t, b, n // R] / sqrt(H) )

(arXiv 2603.23998 as implemented by its authors.) The last row sees every position, so no mask is needed, and
the cost is one q·Kᵀ row per head. fp32 whatever the inputs are; no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def last_row_entropy(query: Tensor, key: Tensor) -> Tensor:
    """Normalised entropy per head, in [0, 1].

    Args:
        query: [S, B, N, H], after rotary and query norm. Only the last position is read.
        key: [S, B, G, H], after rotary and key norm.

    Returns:
        [N] fp32. A sequence of one token has entropy 0 (and ln S = 0): 0 is returned.
    """
    length, batch, groups, size = key.shape
    heads = query.shape[2]
    if length == 1:
        return query.new_zeros(heads, dtype=torch.float32)
    # [B, G, R, H] x [B, G, H, S] -> [B, G, R, S]
    last = query[-1].float().view(batch, groups, heads // groups, size)
    scores = torch.matmul(last, key.float().permute(1, 2, 3, 0)) / math.sqrt(size)
    log_p = scores.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return entropy.mean(0).reshape(heads) / math.log(length)
