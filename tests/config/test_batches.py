"""Batch sizes by step: counts of samples, and ramps that are linear in samples."""

from __future__ import annotations

from itertools import accumulate

import pytest

from megatron_sgt.config.batches import Batches, BatchSpan, grain, ramp_over_samples, ramp_over_steps

BATCHES = Batches((BatchSpan(1, 3, 8), BatchSpan(4, 4, 12), BatchSpan(5, 9, 16)))
SIZES = [8, 8, 8, 12, 16, 16, 16, 16, 16, 16, 16]
"""Of steps 1 to 11: the last size goes on."""


def test_sizes_and_samples_of_every_step() -> None:
    assert [BATCHES.at(step) for step in range(1, 12)] == SIZES
    assert [BATCHES.samples(step) for step in range(12)] == [0, *accumulate(SIZES)]
    assert [BATCHES.last_of(step) for step in (1, 3, 4, 5, 9)] == [3, 3, 4, 9, 9]


@pytest.mark.parametrize(("first", "last"), [(1, 9), (2, 3), (3, 5), (4, 4), (8, 11), (10, 11), (1, 11)])
def test_spans_divide_the_steps(first: int, last: int) -> None:
    found = [(step, span.size) for span in BATCHES.within(first, last) for step in range(span.first, span.last + 1)]
    assert found == [(step, SIZES[step - 1]) for step in range(first, last + 1)]


def by_step(low: int, high: int, samples: int) -> list[int]:
    """The definition, one step after the other."""
    sizes: list[int] = []
    while (done := sum(sizes)) < samples:
        wanted, unit = low * samples + (high - low) * done, samples * grain(low, high)
        sizes.append(-(-wanted // unit) * grain(low, high))
    return sizes


@pytest.mark.parametrize(
    ("low", "high", "samples"), [(64, 256, 10_000), (8, 24, 200), (4, 6, 5), (6, 64, 3001), (1, 9, 7), (8, 16, 1)]
)
def test_a_ramp_is_linear_in_samples_and_rounded_up_to_what_divides(low: int, high: int, samples: int) -> None:
    sizes = [size for steps, size in ramp_over_samples(low, high, samples) for _ in range(steps)]
    assert sizes == by_step(low, high, samples)
    assert sizes[0] == low and max(sizes) <= high and sizes == sorted(sizes)
    assert all(size % grain(low, high) == 0 for size in sizes)


def test_ends_that_divide_make_sizes_that_divide() -> None:
    assert {size % 24 for _, size in ramp_over_samples(48, 360, 50_000)} == {0}


@pytest.mark.parametrize(("low", "high", "steps"), [(64, 256, 50), (8, 24, 9), (4, 6, 1), (8, 160, 67)])
def test_a_ramp_over_steps_is_the_one_over_the_fewest_samples_that_take_them(low: int, high: int, steps: int) -> None:
    sizes = [size for count, size in ramp_over_steps(low, high, steps) for _ in range(count)]
    assert len(sizes) == steps
    least = next(samples for samples in range(1, sum(sizes) + 1) if len(by_step(low, high, samples)) >= steps)
    assert sizes == by_step(low, high, least)[:steps]
