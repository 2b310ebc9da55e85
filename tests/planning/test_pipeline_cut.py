"""Cuts into chunks: against all cuts there are, the stated order of equal ones, and large pipelines."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from itertools import combinations

import pytest

from megatron_sgt.planning.pipeline_cut import best_cut, longest_chunk, lower_bound, stage_costs
from tests.helpers.exhaustive import share_of


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


@pytest.mark.parametrize("first", share_of(range(0, 2000, 100), (0, 100)))
def test_no_other_cut_has_a_smaller_largest_stage(first: int) -> None:
    for seed in range(first, first + 100):
        costs, output, then, size, virtual = problem(seed)
        found = best_cut(costs, output, then, size, virtual)
        longest = longest_chunk(len(costs), size, virtual)
        rivals = [cut for cut in every_cut(len(costs), size * virtual) if max(cut) <= longest]
        assert found in rivals
        best = min(max(stage_costs(costs, output, cut, size)) for cut in rivals)
        assert max(stage_costs(costs, output, found, size)) == best, f"{seed}: {problem(seed)}, {found}"
        assert lower_bound(costs, output, size, virtual) <= best
        if virtual == 1:  # the stated order of equal ones is followed to the end
            equal = (cut for cut in rivals if max(stage_costs(costs, output, cut, size)) == best)
            assert found == min(
                equal, key=lambda cut: (max(stage_costs(then, output, cut, size)), sum(n * n for n in cut), cut)
            )


def test_a_stage_is_the_sum_of_its_chunks() -> None:
    assert stage_costs((1, 2, 3, 4, 5, 6), 10, (1, 2, 1, 2), 2) == [1 + 4, 2 + 3 + 5 + 6 + 10]


def test_a_chunk_is_at_most_a_layer_longer_than_an_even_one() -> None:
    """19 layers beside chunks of 10, which stages pass in step, would cost more than the loops that they avoid."""
    costs = (1000,) * 77 + (1013,) * 3
    found = best_cut(costs, 300, (1000,) * 80, 4, 2)
    assert max(found) <= longest_chunk(80, 4, 2) == 11
    assert max(stage_costs(costs, 300, found, 4)) <= 20_339
    assert longest_chunk(24, 4, 1) == 21


def test_the_cut_is_even_where_nothing_speaks_for_another() -> None:
    assert best_cut((7,) * 8, 0, (7,) * 8, 4, 1) == (2, 2, 2, 2)
    assert best_cut((7,) * 8, 0, (7,) * 8, 2, 2) == (2, 2, 2, 2)
    assert best_cut((7,) * 6, 0, (7,) * 6, 4, 1) == (1, 1, 2, 2)  # longer ones later


@pytest.mark.parametrize("layers", [80, 126])
def test_64_chunks_take_a_moment_and_are_near_the_bound(layers: int) -> None:
    plain = (1_000_003,) * layers
    for loops in ({layers - 1: 61_234, layers - 2: 61_234, layers - 3: 61_234}, {20: 261_234, 50: 261_234}):
        costs = tuple(cost + loops.get(layer, 0) for layer, cost in enumerate(plain))
        before = time.process_time()
        found = best_cut(costs, 180_000, plain, 16, 4)
        assert time.process_time() - before < 1.0
        assert sum(found) == layers and len(found) == 64 and min(found) == 1 and max(found) <= 3
        assert max(stage_costs(costs, 180_000, found, 16)) <= 1.02 * lower_bound(costs, 180_000, 16, 4)
