"""Train, valid and test parts of a data set: contiguous ranges of its sequences, as Megatron cuts them."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_sgt.data.best_fit import count_sequences

SPLIT_NAMES = ("train", "valid", "test")


@dataclass(frozen=True)
class SplitPart:
    """One split of one data set: the sequences first .. last-1."""

    name: str
    first: int
    last: int
    tokens: int
    samples: int
    """Of seq_length + 1 tokens, neighbours sharing one token: (tokens - 1) // seq_length; or packed sequences."""


def split_bounds(num_sequences: int, shares: tuple[float, float, float]) -> list[tuple[int, int]]:
    """Sequence range of each split: the cumulated shares times the number of sequences, rounded to even.

    The same cuts as ``megatron.core.datasets.blended_megatron_dataset_builder``.
    """
    edges = [0.0]
    for share in shares:
        edges.append(edges[-1] + share)
    cuts = [round(edge * float(num_sequences)) for edge in edges]
    return list(pairwise(cuts))


def split_parts(
    lengths: np.ndarray, shares: tuple[float, float, float], seq_length: int, packing: str = "concat"
) -> tuple[SplitPart, ...]:
    """The three splits of a data set whose sequences have ``lengths`` tokens (int32 [sequences])."""
    parts = []
    for name, (first, last) in zip(SPLIT_NAMES, split_bounds(len(lengths), shares), strict=True):
        tokens = int(lengths[first:last].sum(dtype=np.int64))
        samples = max(0, tokens - 1) // seq_length
        if packing == "best_fit":
            samples = count_sequences(lengths[first:last], seq_length)
        parts.append(SplitPart(name, first, last, tokens, samples))
    return tuple(parts)
