"""Whole documents packed into sequences, so that only those are cut which are longer than a sequence.

Best-fit-decreasing packing as in H. Ding et al., "Fewer Truncations Improve Language Modeling" (ICML 2024, arXiv
2404.10830): a document is cut into pieces of T tokens and a shorter rest; the rests, the longest first, each go into
the sequence with the least room among those where they fit, or begin a new one. Theirs searches once per document. Here
all rests of one length and all sequences with one room are handled together: a rest goes where the one before it went
for as long as it fits there. So the search costs O(T log T) steps for any number of documents. No torch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """How the rests of documents lie in sequences.

    Attributes:
        sequences: how many they fill; pieces of T tokens each fill one more.
        runs: int64 [runs, 4], by falling length: (length, first, last, each), so many rests of this length in each of
            the sequences first .. last - 1.
        rooms: int64 [T], the sequences with 0 .. T - 1 tokens left.
    """

    sequences: int
    runs: np.ndarray
    rooms: np.ndarray


def rests(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """How many documents of ``lengths`` have a rest of 0 .. T - 1 tokens: int64 [T]."""
    return np.bincount(lengths % seq_length, minlength=seq_length)


def best_fit(counts: np.ndarray, seq_length: int) -> Packing:
    """Pack ``counts[n]`` rests of n tokens, for n = 1 .. T - 1."""
    ranges: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # the sequences by their room
    rooms: list[int] = []  # those with sequences, ascending
    runs = []
    sequences = 0

    def put(room: int, first: int, last: int) -> None:
        if room and not ranges[room]:
            insort(rooms, room)
        ranges[room].append((first, last))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length]) if length else 0
        while left:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                added = -(-left // (seq_length // length))
                put(seq_length, sequences, sequences + added)
                sequences += added
            room = rooms[at]
            first, last = ranges[room].pop()
            each = min(left, room // length)
            stop = min(last, first + left // each)
            if stop < last:
                ranges[room].append((stop, last))
            elif not ranges[room]:
                del rooms[at]
            runs.append((length, first, stop, each))
            left -= each * (stop - first)
            put(room - each * length, first, stop)
    found = np.zeros(seq_length, np.int64)
    for room, parts in ranges.items():
        if parts:
            found[room] = sum(last - first for first, last in parts)
    return Packing(sequences, np.array(runs, np.int64).reshape(-1, 4), found)


def count_sequences(lengths: np.ndarray, seq_length: int) -> int:
    """Into how many sequences of ``seq_length`` tokens documents of ``lengths`` are packed."""
    packing = best_fit(rests(lengths, seq_length), seq_length)
    return packing.sequences + int((lengths // seq_length).sum(dtype=np.int64))


def pack(lengths: np.ndarray, seq_length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pieces lie in which sequence.

    Documents of equal length are interchangeable; which of them lie together, the order in a sequence and the order of
    the sequences are drawn from ``seed``. (NumPy has frozen the stream of ``RandomState``.)

    Args:
        lengths: int32 [documents].

    Returns:
        begins: int64 [sequences + 1], where the pieces of each sequence begin in ``pieces``.
        pieces: int32 [pieces, 2], (document, n): its tokens from n · T on, T of them or the rest.
    """
    random = np.random.RandomState(seed % 2**32)
    shuffled = np.arange(len(lengths), dtype=np.int32)
    random.shuffle(shuffled)
    rest = (lengths % seq_length).astype(np.min_scalar_type(seq_length))[shuffled]
    packing = best_fit(np.bincount(rest, minlength=seq_length), seq_length)
    by_length = shuffled[np.argsort(seq_length - rest, kind="stable")]
    by_length = by_length[: len(lengths) - int(np.count_nonzero(rest == 0))]
    whole = lengths // seq_length
    full = int(whole.sum(dtype=np.int64))

    pieces = np.empty((len(by_length) + full, 2), np.int32)
    pieces[: len(by_length), 0] = by_length
    pieces[: len(by_length), 1] = whole[by_length]
    cut = np.flatnonzero(whole)
    pieces[len(by_length) :, 0] = np.repeat(cut, whole[cut])
    pieces[len(by_length) :, 1] = _counting(whole[cut])
    total = packing.sequences + full
    number = np.arange(total, dtype=np.int64)
    random.shuffle(number)  # of each sequence among all of them
    where = number[np.concatenate([_sequences(packing.runs), np.arange(packing.sequences, total)])]

    order = np.arange(len(pieces), dtype=np.int64)
    random.shuffle(order)
    order = order[np.argsort(where[order], kind="stable")]
    begins = np.zeros(total + 1, np.int64)
    np.cumsum(np.bincount(where, minlength=total), out=begins[1:])
    return begins, pieces[order]


def _sequences(runs: np.ndarray) -> np.ndarray:
    """The sequence of each rest, by falling length."""
    _, first, last, each = runs.T
    size = (last - first) * each
    return np.repeat(first, size) + _counting(size) // np.repeat(each, size)


def _counting(sizes: np.ndarray) -> np.ndarray:
    """0 .. n - 1 for each n of ``sizes``, one after the other."""
    ends = np.cumsum(sizes, dtype=np.int64)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)
