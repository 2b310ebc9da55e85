"""Cuts into chunks: against all cuts there are, the stated order of equal ones, and large pipelines."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from itertools import combinations

import pytest

from megatron_sgt.config.pipeline import even_layout
from megatron_sgt.planning.interleaved import SETTLED
from megatron_sgt.planning.pipeline_cut import best_cut, chunk_costs
from tests.helpers.exhaustive import share_of
from tests.helpers.pipeline_schedule import simulated_time


def every_cut(layers: int, parts: int) -> Iterator[tuple[int, ...]]:
    for ends in combinations(range(1, layers), parts - 1):
        yield tuple(end - start for start, end in zip((0, *ends), (*ends, layers), strict=True))


def problem(seed: int) -> tuple[tuple[int, ...], int, tuple[int, ...], int, int]:
    """Layers as they are: alike, a few that loop deep in the model or anywhere, recompute of the first half; or any."""
    draw = random.Random(seed)
    size, virtual = draw.choice([(2, 1), (3, 1), (4, 1), (2, 2), (2, 3), (3, 2), (4, 2)])
    layers = draw.randint(size * virtual, size * virtual + 6)
    costs, kind = [100] * layers, draw.choice(["deep", "anywhere", "recompute", "any"])
    if kind == "any":
        costs = [draw.randint(50, 150) for _ in costs]
    looping = range(layers)[-3:] if kind == "deep" else draw.sample(range(layers), 2 if kind == "anywhere" else 0)
    for layer in looping:
        costs[layer] += draw.randint(1, 100)
    for layer in range(layers // 2 if kind == "recompute" else 0):
        costs[layer] += 33
    then = [100 + 33 * (layer < layers // 2) * (kind == "recompute") for layer in range(layers)]
    return tuple(costs), draw.choice([0, 37, 110, 250, 800]), tuple(then), size, virtual


def step(costs: tuple[int, ...], output: int, cut: tuple[int, ...], size: int) -> float:
    """The time of a long step."""
    return simulated_time(chunk_costs(costs, output, cut), size, SETTLED * size)


@pytest.mark.parametrize("first", share_of(range(0, 2000, 100), (0, 100)))
def test_no_other_cut_of_one_chunk_per_stage_has_a_smaller_largest_stage(first: int) -> None:
    """And the stated order of equal ones is followed to the end."""
    for seed in range(first, first + 100):
        costs, output, then, size, virtual = problem(seed)
        if virtual > 1:
            continue
        found = best_cut(costs, output, then, size, 1)
        assert found == min(
            every_cut(len(costs), size),
            key=lambda cut: (
                max(chunk_costs(costs, output, cut)),
                max(chunk_costs(then, output, cut)),
                sum(n * n for n in cut),
                cut,
            ),
        ), f"{seed}: {problem(seed)}"


@pytest.mark.parametrize("seed", share_of(range(300), range(16)))
def test_hardly_any_other_cut_of_several_chunks_per_stage_is_faster(seed: int) -> None:
    """Of all cuts there are, most often none; none by more than 5 %. No even one is."""
    costs, output, then, size, virtual = problem(seed)
    if virtual == 1:
        size, virtual = 2, 2
    costs, then = costs[: size * virtual + 3], then[: size * virtual + 3]
    if len(costs) < size * virtual:
        costs, then = (100,) * (size * virtual), (100,) * (size * virtual)
    found = step(costs, output, best_cut(costs, output, then, size, virtual), size)
    even = even_layout(size, virtual, len(costs)).counts
    assert found <= step(costs, output, even, size) * (1 + 1e-9)
    assert found <= 1.05 * min(step(costs, output, cut, size) for cut in every_cut(len(costs), size * virtual))


def test_a_chunk_is_the_sum_of_its_layers() -> None:
    assert chunk_costs((1, 2, 3, 4, 5, 6), 10, (1, 2, 1, 2)) == [1, 2 + 3, 4, 5 + 6 + 10]


def test_the_cut_is_even_where_nothing_speaks_for_another() -> None:
    assert best_cut((7,) * 8, 0, (7,) * 8, 4, 1) == (2, 2, 2, 2)
    assert best_cut((7,) * 8, 0, (7,) * 8, 2, 2) == (2, 2, 2, 2)
    assert best_cut((7,) * 6, 0, (7,) * 6, 4, 1) == (1, 1, 2, 2)  # longer ones later


def test_longer_chunks_lie_in_a_row() -> None:
    """80 layers in 64 chunks: never one long chunk in each round of 16, for which all stages would wait."""
    found = best_cut((7,) * 80, 0, (7,) * 80, 16, 4)
    assert sorted(found) == [1] * 48 + [2] * 16 and "2" * 16 in "".join(map(str, found))


@pytest.mark.parametrize("layers", [80, 126])
def test_64_chunks_take_a_moment_and_are_never_slower_than_even_ones(layers: int) -> None:
    plain = (1_000_003,) * layers
    for loops in ({layers - 1: 61_234, layers - 2: 61_234, layers - 3: 61_234}, {20: 261_234, 50: 261_234}):
        costs = tuple(cost + loops.get(layer, 0) for layer, cost in enumerate(plain))
        before = time.process_time()
        found = best_cut(costs, 180_000, plain, 16, 4)
        assert time.process_time() - before < 1.0
        assert sum(found) == layers and len(found) == 64 and min(found) == 1 and max(found) <= 3
        assert step(costs, 180_000, found, 16) <= step(costs, 180_000, even_layout(16, 4, layers).counts, 16)
