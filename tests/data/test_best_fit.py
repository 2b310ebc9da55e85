"""Best-fit packing against one document at a time, and against what a packing must be."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import numpy as np
import pytest

from megatron_sgt.data.best_fit import best_fit, count_sequences, pack, rests


def one_at_a_time(lengths: list[int], seq_length: int) -> list[int]:
    """The room that best-fit-decreasing packing leaves in its sequences, by definition; ascending."""
    pieces = [seq_length] * sum(n // seq_length for n in lengths) + [n % seq_length for n in lengths]
    rooms: list[int] = []
    for piece in sorted(filter(None, pieces), reverse=True):
        fitting = [room for room in rooms if room >= piece]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append(min(fitting, default=seq_length) - piece)
    return sorted(rooms)


def corpus(seed: int, seq_length: int) -> list[int]:
    draw = random.Random(seed)
    kind = seed % 4
    if kind == 0:
        return [draw.randint(0, 3 * seq_length) for _ in range(draw.randint(1, 60))]
    if kind == 1:
        return [int(draw.lognormvariate(1.5, 1.0)) for _ in range(200)]
    if kind == 2:
        return draw.choices([1, 2, seq_length // 2, seq_length // 2 + 1, seq_length - 1, seq_length], k=80)
    return [draw.randint(1, max(1, seq_length // 3)) for _ in range(150)]


@pytest.mark.parametrize("seq_length", [2, 8, 17, 40])
def test_the_packing_is_best_fit_decreasing(seq_length: int) -> None:
    for seed in range(40):
        lengths = corpus(seed, seq_length)
        expected = one_at_a_time(lengths, seq_length)
        array = np.array(lengths, np.int32)
        packing = best_fit(rests(array, seq_length), seq_length)
        assert count_sequences(array, seq_length) == len(expected)
        full = sum(n // seq_length for n in lengths)
        found = np.repeat(np.arange(seq_length), packing.rooms).tolist()
        assert sorted(found + [0] * full) == expected

        begins, pieces = pack(array, seq_length, seed)
        assert len(begins) == len(expected) + 1 and begins[0] == 0 and begins[-1] == len(pieces)
        sizes = np.minimum(seq_length, array[pieces[:, 0]] - pieces[:, 1] * seq_length)
        assert (sizes > 0).all()
        rooms = [seq_length - int(sizes[a:b].sum()) for a, b in pairwise(begins)]
        assert sorted(rooms) == expected
        wanted = [(d, n) for d, size in enumerate(lengths) for n in range(-(-size // seq_length))]
        assert sorted(map(tuple, pieces.tolist())) == wanted, "every token once"


def test_the_example_of_the_paper() -> None:
    """Figure 1: documents of 14, 7, 5, 2 and 3 tokens in sequences of 8."""
    lengths = np.array([14, 7, 5, 2, 3], np.int32)
    begins, pieces = pack(lengths, 8, 0)
    sequences = {frozenset(map(tuple, pieces[a:b].tolist())) for a, b in pairwise(begins)}
    assert sequences == {
        frozenset({(0, 0)}), frozenset({(1, 0)}), frozenset({(0, 1), (3, 0)}), frozenset({(2, 0), (4, 0)}),
    }  # fmt: skip


def test_the_seed_decides_what_is_interchangeable() -> None:
    lengths = np.array([3, 5] * 40, np.int32)
    first, again, other = (pack(lengths, 8, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], other[1])
    partners = {frozenset(pair) for pair in first[1][:, 0].reshape(-1, 2).tolist()}
    assert partners != {frozenset(pair) for pair in other[1][:, 0].reshape(-1, 2).tolist()}
    assert {tuple(lengths[list(pair)].tolist()) for pair in first[1][:, 0].reshape(-1, 2)} == {(3, 5), (5, 3)}


def test_recorded_order() -> None:
    """A library update must not change the order of a run that goes on."""
    begins, pieces = pack(np.array([5, 3, 20, 0, 8, 1, 2, 6], np.int32), 8, 1234)
    assert (begins.tolist(), pieces.tolist()) == (
        [0, 2, 3, 4, 6, 8, 9],
        [[6, 0], [7, 0], [4, 0], [2, 0], [5, 0], [2, 2], [1, 0], [0, 0], [2, 1]],
    )


def test_a_million_documents_take_no_search_each() -> None:
    lengths = np.random.default_rng(0).integers(0, 9000, 1_000_000, np.int32)
    start = time.process_time()
    packing = best_fit(rests(lengths, 4096), 4096)
    assert time.process_time() - start < 1
    assert len(packing.runs) < 100_000
    padding = 1 - int((lengths % 4096).sum()) / (4096 * packing.sequences)
    assert padding < 0.01


def test_nothing_to_pack() -> None:
    assert count_sequences(np.zeros(3, np.int32), 8) == count_sequences(np.zeros(0, np.int32), 8) == 0
    begins, pieces = pack(np.zeros(3, np.int32), 8, 0)
    assert begins.tolist() == [0] and pieces.shape == (0, 2)
    begins, pieces = pack(np.full(2, 16, np.int32), 8, 0)
    assert begins.tolist() == [0, 1, 2, 3, 4] and sorted(map(tuple, pieces.tolist())) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
