"""Which data set of a weighted blend the i-th sample comes from: a rule independent of earlier samples.

The weights are rounded to integers c_d that sum to ``PERIOD``; the first period is laid out once and repeats.
In the period, the k-th sample of data set d (k = 0 .. c_d - 1) has the ideal place (k + ½) / c_d, and the
samples are sorted by their ideal places, ties by data set. That is Webster's method of apportionment: every prefix is
as close to the weights as whole samples allow. The order depends only on the weights, so a longer run, or one on
another number of ranks, sees the same samples at the same places.
"""

from collections.abc import Sequence

import numpy as np

PERIOD = 1 << 18
"""Samples after which the layout repeats: weights are met to 1 part in 262,144."""


class Blend:
    """The layout for the given weights (any positive unit)."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = round_to_period(weights)
        """Samples that each data set contributes to a period."""
        source = np.repeat(np.arange(len(self.counts)), self.counts)
        rank = np.concatenate([np.arange(count) for count in self.counts])
        place = (2 * rank + 1) / (2 * np.array(self.counts)[source])
        order = np.lexsort((source, place))
        self._source = source[order].astype(np.uint16)
        self._rank = rank[order].astype(np.uint32)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(d, k): sample ``index`` of the blend is the k-th sample drawn from data set d."""
        period, slot = divmod(index, len(self._source))
        source = int(self._source[slot])
        return source, period * self.counts[source] + int(self._rank[slot])

    def drawn(self, samples: int) -> tuple[int, ...]:
        """How many of the first ``samples`` samples of the blend are drawn from each data set."""
        periods, slots = divmod(samples, len(self._source))
        rest = np.bincount(self._source[:slots], minlength=len(self.counts))
        return tuple(periods * count + int(more) for count, more in zip(self.counts, rest, strict=True))


def round_to_period(weights: Sequence[float]) -> tuple[int, ...]:
    """Integers proportional to ``weights`` that sum to PERIOD (1 for a single one), by largest remainders.

    Raises:
        ValueError: a weight that is not positive, or so small that it would round to nothing.
    """
    if len(weights) == 1:
        return (1,)
    total = sum(weights)
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"blend weights must be positive numbers, got {list(weights)}")
    exact = [weight / total * PERIOD for weight in weights]
    if min(exact) < 1:
        raise ValueError(
            f"blend weight {min(weights):g} is less than 1/{PERIOD} of their sum {total:g}: its data set "
            "would hardly be seen; raise it or omit the data set"
        )
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda d: (counts[d] - exact[d], d))
    for d in by_remainder[: PERIOD - sum(counts)]:
        counts[d] += 1
    return tuple(counts)
