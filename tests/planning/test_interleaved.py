"""The time of an interleaved step, against a simulation of every pass."""

from __future__ import annotations

import random

import pytest

from megatron_sgt.planning.interleaved import SETTLED, interleaved_time
from tests.helpers.exhaustive import share_of
from tests.helpers.pipeline_schedule import simulated_time

SHAPES = [(2, 2), (2, 4), (3, 3), (4, 2), (4, 4), (8, 2)]


def chunks(draw: random.Random, size: int, virtual: int) -> list[int]:
    """Even ones, rounds of equal ones, or any; the last one has an output layer."""
    parts, kind = size * virtual, draw.choice(["near", "rounds", "any"])
    if kind == "near":
        found = [draw.choice([200, 300]) for _ in range(parts)]
    elif kind == "rounds":
        found = [length for _ in range(virtual) for length in [100 * draw.randint(1, 4)] * size]
    else:
        found = [draw.randint(100, 400) for _ in range(parts)]
    found[-1] += draw.choice([0, 35, 100, 200])
    return found


@pytest.mark.parametrize("seed", share_of(range(200), range(24)))
def test_a_step_takes_what_its_passes_take(seed: int) -> None:
    """Exact up to SETTLED rounds; continued from there within 1 %."""
    draw = random.Random(seed)
    size, virtual = draw.choice(SHAPES)
    each = chunks(draw, size, virtual)
    for rounds in (1, SETTLED):
        assert interleaved_time(each, size, rounds * size) == pytest.approx(
            3 * simulated_time(each, size, rounds * size)
        )
    assert interleaved_time(each, size, 20 * size) == pytest.approx(3 * simulated_time(each, size, 20 * size), rel=0.01)


def test_equal_chunks_wait_for_nothing_but_filling_and_draining() -> None:
    for size, virtual in SHAPES:
        assert interleaved_time([10] * size * virtual, size, 8 * size) == 3 * 10 * (8 * size * virtual + size - 1)


def test_long_chunks_in_every_row_cost_what_equal_sums_of_the_stages_hide() -> None:
    even, crossed = [20] * 8, [10, 30] * 2 + [30, 10] * 2
    assert interleaved_time(crossed, 4, 32) > 1.15 * interleaved_time(even, 4, 32)
