"""How long the documents of a data set are. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)
_BAR = 30


@dataclass(frozen=True)
class Bucket:
    """The documents of ``shortest`` .. ``longest`` tokens: how many they are, and their tokens."""

    shortest: int
    longest: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class LengthSummary:
    """Of all documents. ``percentiles``: the length that so many percent of them do not exceed.

    ``buckets``: 0, then from each power of two up to the next, as far as there are documents.
    """

    documents: int
    tokens: int
    empty: int
    mean: float
    longest: int
    percentiles: dict[int, int]
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(cls, lengths: np.ndarray) -> LengthSummary:
        """From ``lengths``, int32 [documents]."""
        tokens = int(lengths.sum(dtype=np.int64))
        if not len(lengths):
            return cls(0, 0, 0, 0.0, 0, {}, ())
        found = np.percentile(lengths, PERCENTILES, method="lower").tolist()
        bits = np.frexp(lengths)[1]  # of 0: 0; of 2^(k - 1) .. 2^k - 1: k
        documents = np.bincount(bits)
        held = np.bincount(bits, weights=lengths)
        buckets = tuple(
            Bucket(1 << k - 1 if k else 0, (1 << k) - 1, int(documents[k]), int(held[k]))
            for k in np.flatnonzero(documents).tolist()
        )
        return cls(
            len(lengths),
            tokens,
            int(documents[0]),
            tokens / len(lengths),
            int(lengths.max()),
            dict(zip(PERCENTILES, map(int, found), strict=True)),
            buckets,
        )

    def lines(self) -> Iterator[str]:
        """For a person."""
        empty = f", {self.empty:,} of them empty" if self.empty else ""
        yield f"  documents  {self.documents:,}{empty}"
        yield f"  tokens     {self.tokens:,}"
        if not self.documents:
            return
        shares = " · ".join(f"{share} %: {length:,}" for share, length in self.percentiles.items())
        yield f"  lengths    mean {self.mean:,.1f} · {shares} · longest {self.longest:,}"
        most = max(bucket.documents for bucket in self.buckets)
        width = len(f"{self.buckets[-1].longest:,}")
        yield f"    {'of length':<{2 * width + 4}} {'documents':>13} {'of the tokens':>14}"
        for bucket in self.buckets:
            share = 100 * bucket.tokens / max(1, self.tokens)
            bar = "#" * -(-_BAR * bucket.documents // most)
            limits = f"{bucket.shortest:>{width},} .. {bucket.longest:<{width},}"
            yield f"    {limits} {bucket.documents:>13,} {share:>12.1f} %  {bar}"
