"""Attended pairs and padding against the sequences laid out by hand."""

from __future__ import annotations

import random
from itertools import groupby, pairwise

import numpy as np
import pytest

from megatron_sgt.data.attended import attended
from megatron_sgt.data.best_fit import pack

T = 16


def pairs(sequence: list[int]) -> int:
    """Of a sequence of document numbers, one per token."""
    sizes = [len(list(group)) for _, group in groupby(sequence)]
    return sum(n * (n + 1) // 2 for n in sizes)


def corpora() -> list[list[int]]:
    draw = random.Random(3)
    return [
        [512, 512],
        [16] * 9,
        [8] * 10,
        [33],
        [1] * 50,
        *([draw.choice([0, 1, 2, 7, 15, 16, 17, 40]) for _ in range(60)] for _ in range(20)),
    ]


@pytest.mark.parametrize("lengths", corpora(), ids=lambda lengths: f"{len(lengths)} of {sum(lengths)}")
def test_pairs_are_those_of_the_sequences(lengths: list[int]) -> None:
    array = np.array(lengths, np.int32)
    laid_out = [number for number, size in enumerate(lengths) for _ in range(size)]
    windows = [laid_out[i : i + T] for i in range(0, len(laid_out) - T, T)]
    found = attended(array, T, "concat", True)
    assert found.sequences == len(windows) and found.padding == 0
    assert found.pairs == pytest.approx(np.mean([pairs(window) for window in windows]), rel=1e-12)
    plain = attended(array, T, "concat", False)
    assert (plain.sequences, plain.pairs, plain.padding) == (len(windows), T * (T + 1) / 2, 0)

    begins, pieces = pack(array, T, 5)
    sequences = []
    for first, last in pairwise(begins.tolist()):
        tokens = [d for d, n in pieces[first:last].tolist() for _ in range(min(T, lengths[d] - n * T))]
        sequences.append(tokens + [-1] * (T - len(tokens)))
    found = attended(array, T, "best_fit", True)
    assert found.sequences == len(sequences)
    assert found.pairs == pytest.approx(np.mean([pairs(sequence) for sequence in sequences]), rel=1e-12)
    assert found.padding == pytest.approx(np.mean([sequence.count(-1) for sequence in sequences]) / T, abs=1e-12)


def test_documents_of_one_eighth() -> None:
    found = attended(np.full(64, 512, np.int32), 4096, "concat", True)
    assert found.pairs == 8 * 512 * 513 / 2


def test_less_than_a_sequence() -> None:
    found = attended(np.array([3, 0, 5], np.int32), T, "concat", True)
    assert (found.sequences, found.pairs, found.padding) == (1, 2 * (6 + 15), 0)
    with pytest.raises(ValueError, match="without tokens"):
        attended(np.zeros(4, np.int32), T, "best_fit", True)


def test_counts_beyond_32_bits() -> None:
    lengths = np.full(3, 2**31 - 1, np.int32)
    for packing in ("concat", "best_fit"):
        found = attended(lengths, 1 << 20, packing, True)
        assert 0.99 < found.pairs / (2.0**20 * (2.0**20 + 1) / 2) <= 1 and found.padding < 0.001
