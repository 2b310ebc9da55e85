"""How many sequences each optimizer step takes: the arithmetic of steps, samples and tokens. Pure."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import gcd

MOST_SIZES = 1000
"""Sizes that a ramp may pass through: the data is opened anew for each."""


@dataclass(frozen=True)
class BatchSpan:
    """Applied steps ``first`` to ``last``, both inclusive, of ``size`` sequences."""

    first: int
    last: int
    size: int

    @property
    def steps(self) -> int:
        return self.last - self.first + 1

    @property
    def samples(self) -> int:
        return self.steps * self.size


@dataclass(frozen=True)
class Batches:
    """The global batch size of every applied step, counted from 1.

    Attributes:
        spans: without a gap, from step 1; the size of the last one goes on after it.
    """

    spans: tuple[BatchSpan, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return [span.last for span in self.spans[:-1]]

    @cached_property
    def _samples_before(self) -> list[int]:
        """By span: samples of all steps before it."""
        return [0, *accumulate(span.samples for span in self.spans[:-1])]

    def at(self, step: int) -> int:
        """The size of step ``step``."""
        return self.spans[bisect_left(self._ends, step)].size

    def last_of(self, step: int) -> int:
        """The last step that has the batch size of ``step`` with all steps between."""
        return self.spans[bisect_left(self._ends, step)].last

    def samples(self, steps: int) -> int:
        """Samples of the first ``steps`` applied steps."""
        index = bisect_left(self._ends, steps)
        span = self.spans[index]
        return self._samples_before[index] + (steps - span.first + 1) * span.size

    def within(self, first: int, last: int) -> Iterator[BatchSpan]:
        """Steps ``first`` to ``last``, divided where the size changes."""
        while first <= last:
            end = min(last, self.last_of(first)) if first <= self.spans[-1].last else last
            yield BatchSpan(first, end, self.at(first))
            first = end + 1


def grain(low: int, high: int) -> int:
    """What the sizes of a ramp are multiples of: where its two ends divide among ranks, all of them do."""
    return gcd(low, high)


def ramp_over_samples(low: int, high: int, samples: int) -> Iterator[tuple[int, int]]:
    """Yield (steps, size) of a batch that rises from ``low`` to ``high`` linearly over ``samples`` samples.

    After s of them a step has low + (high - low) s / samples sequences, rounded up to a multiple of ``grain``.
    """
    done, unit = 0, grain(low, high)
    while done < samples:
        size = -(-(low * samples + (high - low) * done) // (samples * unit)) * unit
        until = samples if size >= high else (size - low) * samples // (high - low) + 1
        steps = -(-(min(until, samples) - done) // size)
        yield steps, size
        done += steps * size


@lru_cache(maxsize=64)
def ramp_over_steps(low: int, high: int, steps: int) -> tuple[tuple[int, int], ...]:
    """The same over ``steps`` steps: over the fewest samples that take so many, cut where the steps end."""
    least, most = 1, steps * high
    while least < most:
        middle = (least + most) // 2
        if sum(count for count, _ in ramp_over_samples(low, high, middle)) < steps:
            least = middle + 1
        else:
            most = middle
    found, left = [], steps
    for count, size in ramp_over_samples(low, high, least):
        if left:
            found.append((min(count, left), size))
            left -= found[-1][0]
    return tuple(found)
