"""Counts of what was read, by hand; tests/edges/test_resume_changes.py compares them with whole runs."""

import numpy as np
import pytest

from megatron_sgt.data import order
from megatron_sgt.data.order import EpochOrder, Reading, Tally, compare, documents_read
from megatron_sgt.data.permutation import RandomPermutation

LENGTHS = np.array([5, 0, 3, 9, 4], np.int32)


def epoch(seq_length: int, documents: list[int], first: int = 0) -> EpochOrder:
    """Windows in the order of the layout, but for the epoch's permutation."""
    laid_out = np.array(documents, np.int32)
    windows = np.arange((int(LENGTHS[laid_out].sum()) - 1) // seq_length, dtype=np.uint32)
    return EpochOrder(first, laid_out, windows, LENGTHS, seq_length, (1, 0))


def test_where_documents_begin() -> None:
    made = epoch(4, [3, 1, 0, 4, 2])
    places = np.array([9, 9, 18, 0, 14])
    assert made.window(np.arange(5), np.arange(5)).tolist() == ((places + np.arange(5)) // 4).tolist()
    assert made.first_cut(np.arange(5)).tolist() == (-places % 4).tolist()
    assert made.samples == 5, "21 tokens, of which the last is no window of 4 + 1"


@pytest.mark.parametrize("drawn", [0, 1, 4, 5, 7, 23])
def test_times_read_are_those_of_the_samples(drawn: int) -> None:
    made = epoch(4, [3, 1, 0, 4, 2])
    epochs = [RandomPermutation(5, (1, 0, e)) for e in range(5)]
    read = [epochs[i // 5][i % 5] for i in range(drawn)]
    assert made.times_read(np.arange(6), drawn).tolist() == [read.count(w) for w in range(5)] + [0]


def test_windows_of_two_lengths() -> None:
    short, long = epoch(4, [0, 1, 2, 3, 4]), epoch(8, [0, 1, 2, 3, 4])
    assert (short.samples, long.samples) == (5, 2)
    whole = compare(LENGTHS, [Reading(short, 0, 5)], [Reading(long, 0, 2)])
    assert whole == Tally(0, 0, 0, 0, 0), "16 tokens of both; what the longer windows leave over does not come again"
    nothing = compare(LENGTHS, [], [Reading(long, 0, 2)])
    assert nothing == Tally(tokens_skipped=16, documents_skipped=3)
    twice = compare(LENGTHS, [Reading(short, 0, 10)], [Reading(long, 0, 2)])
    assert twice == Tally(tokens_again=16, documents_again=3, windows_again=2)
    later = compare(LENGTHS, [Reading(short, 5, 10)], [Reading(long, 0, 2)])
    assert later == Tally()


def test_documents_outside_of_the_split_were_not_read() -> None:
    part = epoch(2, [3, 2], first=2)
    assert documents_read(LENGTHS, 0, 5, [Reading(part, 0, 5)]) == 2
    assert documents_read(LENGTHS, 4, 5, [Reading(part, 0, 5)]) == 0


def test_a_sample_of_the_documents_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "EXACT_PIECES", 5)
    made = epoch(4, [0, 1, 2, 3, 4])
    found = compare(LENGTHS, [], [Reading(made, 0, 5)])
    assert not found.exact and found.windows_again is None and 0 < found.tokens_skipped <= 21
