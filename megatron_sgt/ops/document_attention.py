"""Causal attention that never leaves a document (definition: ``attention.py``), without a mask.

By attention that knows no documents, one call per length of document; or in one call of torch's variable-length
kernel, where it runs. Of a mask that a kernel might not look at there is none.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_sgt.ops.documents import Documents


def by_document(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
) -> Tensor:
    """``attention`` of each document by itself; documents of the same length make up the batch of one call.

    Args:
        attention: causal attention from the last positions, [Q, B, N, H] and [K, B, G, H] twice -> [Q, B, N, H].
        query: [Q, B, N, H], the last Q of K positions. key, value: [K, B, G, H].
        documents: of at least K positions.

    Returns:
        [Q, B, N, H].
    """
    queries, batch = query.shape[:2]
    shares = [share for sequence in documents.shares(queries, len(key)) for share in sequence]
    if len(shares) == batch:
        return attention(query, key, value)
    q = _sequences(query).split([queries for queries, _ in shares])
    k, v = (_sequences(t).split([keys for _, keys in shares]) for t in (key, value))
    alike = defaultdict(list)
    for number, share in enumerate(shares):
        if share[0]:
            alike[share].append(number)
    out = list(q)  # those without queries stay
    for numbers in alike.values():
        found = attention(*(_batch([pieces[number] for number in numbers]) for pieces in (q, k, v)))
        for number, piece in zip(numbers, found.unbind(1), strict=True):
            out[number] = piece
    return torch.cat(out).unflatten(0, (batch, queries)).transpose(0, 1)


@cache
def variable_length_kernel() -> Callable[..., Any] | None:
    """``torch.nn.attention.varlen.varlen_attn``, if this version of torch has it with windows and grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys() else None


def variable_length(
    kernel: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, documents: Documents
) -> Tensor:
    """Attention of all documents in one call of ``kernel``, which is FlashAttention; Q = K = S."""
    queries, batch, heads = query.shape[:3]
    flat = (_sequences(t) for t in (query, key, value))
    offsets, longest = documents.offsets, documents.longest
    # A window of nothing to the right is what this function calls causal.
    out = kernel(
        *flat, offsets, offsets, longest, longest, window_size=(-1, 0), enable_gqa=heads != key.shape[2]
    )  # fmt: skip
    return out.unflatten(0, (batch, queries)).transpose(0, 1)


def _sequences(x: Tensor) -> Tensor:
    """[S, B, *] -> [B · S, *], sequence by sequence."""
    return x.transpose(0, 1).flatten(0, 1)


def _batch(pieces: list[Tensor]) -> Tensor:
    """Documents [n, *] -> [n, documents, *]; a view of one."""
    return pieces[0].unsqueeze(1) if len(pieces) == 1 else torch.stack(pieces, dim=1)
