"""What attention has to do for documents of given lengths, and how much of the sequences is padding. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sgt.data.best_fit import best_fit, rests


@dataclass(frozen=True)
class Attended:
    """Means over the sequences of T tokens that documents fill.

    Attributes:
        sequences: how many they fill.
        pairs: of query and key, the query itself included, in a sequence; T (T + 1) / 2 where nothing is masked.
            Padding at the end of a sequence counts as a document, as it is computed.
        padding: share of the tokens.
    """

    sequences: int
    pairs: float
    padding: float


def attended(lengths: np.ndarray, seq_length: int, packing: str, reset_attention_mask: bool) -> Attended:
    """Measure one epoch of the documents ``lengths``, which may be a fair sample of a larger data set.

    With ``packing: concat`` they are laid out in the given order; a run's order is another one of the same documents.
    Documents that fill less than one sequence count as one sequence of them, which is continued by others.

    Args:
        lengths: int32 [documents], tokens of each, not all of them 0.
        seq_length: T.
        packing, reset_attention_mask: as in the configuration's section ``data``.

    Raises:
        ValueError: no tokens.
    """
    tokens = int(lengths.sum(dtype=np.int64))
    if tokens == 0:
        raise ValueError("documents without tokens fill no sequence")
    if packing == "best_fit":
        return _packed(lengths, tokens, seq_length)
    sequences = max(1, (tokens - 1) // seq_length)
    if not reset_attention_mask:
        return Attended(sequences, _pairs(seq_length), 0.0)
    whole = sequences * seq_length if tokens > seq_length else tokens
    ends = np.minimum(np.cumsum(lengths, dtype=np.int64), whole)
    sizes = np.diff(ends, prepend=0)
    first = np.minimum(sizes, seq_length - (ends - sizes) % seq_length)
    full, rest = np.divmod(sizes - first, seq_length)
    pairs = float((_pairs(first) + _pairs(rest)).sum()) + int(full.sum()) * _pairs(seq_length)
    return Attended(sequences, pairs * seq_length / whole, 0.0)


def _packed(lengths: np.ndarray, tokens: int, seq_length: int) -> Attended:
    counts = rests(lengths, seq_length)
    packing = best_fit(counts, seq_length)
    full = int((lengths // seq_length).sum(dtype=np.int64))
    sequences = packing.sequences + full
    pairs = full * _pairs(seq_length) + float(((counts + packing.rooms) * _pairs(np.arange(seq_length))).sum())
    return Attended(sequences, pairs / sequences, 1 - tokens / (sequences * seq_length))


def _pairs(tokens: Any) -> Any:
    """Pairs of a document of ``tokens``, a number or an array, as floats: no product can overflow."""
    return tokens * (tokens + 1.0) / 2
