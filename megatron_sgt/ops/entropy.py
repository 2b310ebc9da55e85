"""Attention entropy of the last query row, the measure on which growth decides.

    e[n] = mean_b ( − Σ_t p_t ln p_t ) / ln S ,   p = softmax_t( q[S-1, b, n] · k[t, b, n // R] / sqrt(H) )

(arXiv 2603.23998 as implemented by its authors.) The last row sees every position, so no mask is needed, and
the cost is one q·Kᵀ row per head. fp32 whatever the inputs are; no gradient.

In a sequence of documents the row is that of the last token before the padding, t runs over its document alone, and
S is the number of tokens that it sees, n. Sequences whose n is below a minimum do not count; a rank that holds a share
of the tokens measures the sequences whose row it holds. So a mean needs the sum over the sequences that count, and
their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sgt.ops.documents import Documents


@torch.no_grad()
def last_row_entropy(query: Tensor, key: Tensor, documents: Documents | None = None, minimum: int = 2) -> Tensor:
    """Normalised entropy per head, in [0, 1].

    Args:
        query: [S, B, N, H], after rotary and query norm. Only the last position is read; with documents the last one
            before the padding, and the queries may be the last Q of S.
        key: [S, B, G, H], after rotary and key norm.
        documents: those of S positions at least.
        minimum: tokens that the last row of a sequence must see to count; 2 at least. Only with ``documents``.

    Returns:
        [N] fp32, the mean over the sequences. A sequence of one token has entropy 0 (and ln S = 0): 0 is returned.
        With ``documents`` [2, N]: the sum over the sequences that count, and how many do.
    """
    if documents is not None:
        return documents_entropy(query, key, documents.starts, documents.last, minimum)
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


@torch.no_grad()
def documents_entropy(query: Tensor, key: Tensor, starts: Tensor, last: Tensor, minimum: int) -> Tensor:
    """``last_row_entropy`` with documents: ``starts`` [B, K at least] and ``last`` [B], as of ``Documents``."""
    keys, batch, groups, size = key.shape
    rows = _LastRows.of(len(query), keys, starts, last, minimum)
    row = query[rows.query, torch.arange(batch, device=query.device)].float().view(batch, groups, -1, size)
    scores = torch.matmul(row, key.float().permute(1, 2, 3, 0)) / math.sqrt(size)
    place = torch.arange(keys, device=key.device)
    hidden = (place < rows.start[:, None]) | (place >= (rows.start + rows.tokens)[:, None])
    p = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
    return rows.summed(torch.special.entr(p).sum(-1).flatten(1))


def entropy_of_rows(rows: Tensor, keys: int, documents: Documents, minimum: int = 2) -> Tensor:
    """As ``last_row_entropy`` returns it with ``documents``, from the entropies of all rows [B, h, Q] in nats.

    ``keys``: K; the rows are those of the last Q of K positions.
    """
    last = _LastRows.of(rows.shape[2], keys, documents.starts, documents.last, minimum)
    return last.summed(rows.gather(2, last.query[:, None, None].expand(-1, rows.shape[1], 1)).squeeze(2))


@dataclass(frozen=True)
class _LastRows:
    """The last row of each sequence [B]: its query, its document, how many tokens it sees, if it counts."""

    query: Tensor
    start: Tensor
    tokens: Tensor
    counts: Tensor

    @classmethod
    def of(cls, queries: int, keys: int, starts: Tensor, last: Tensor, minimum: int) -> _LastRows:
        query = last.long() - (keys - queries)
        held = (query >= 0) & (query < queries)
        query = query.clamp(0, queries - 1)
        place = query + (keys - queries)
        start = starts.gather(1, place[:, None]).squeeze(1)
        tokens = place + 1 - start
        return cls(query, start, tokens, held & (tokens >= max(2, minimum)))

    def summed(self, entropies: Tensor) -> Tensor:
        """[B, N] in nats -> [2, N]."""
        parts = torch.where(self.counts[:, None], entropies / self.tokens.log()[:, None], 0.0)
        return torch.stack([parts.sum(0), self.counts.sum().to(parts).expand(parts.shape[1])])
