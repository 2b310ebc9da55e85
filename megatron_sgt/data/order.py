"""Which tokens of one data set a run has read, from the run's own sample index: whole arrays at a time, no data.

A window is the ``seq_length`` tokens of one sample; the windows of an epoch lie one after the other in the documents
as they were shuffled (GPTDataset's document index), what is left behind the last one is not read. The order in which
the windows are drawn is GPTDataset's shuffle index under the permutation of the epoch (gpt_dataset.py). Packed
documents are cut into windows one by one, and each of a sequence's pieces lies in the window with its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sgt.data.permutation import RandomPermutation

EXACT_PIECES = 24_000_000
"""So many pieces of documents are counted one by one; of a larger data set, those of a sample of its documents."""


class EpochOrder:
    """The training samples of one data set under one seed and ``seq_length``.

    Args:
        first: the first document of the training split; ``documents`` are numbers from it on.
        documents: int32 [documents of the split], in the order in which their tokens are laid out.
        windows: uint32 [samples], GPTDataset's shuffle index.
        lengths: int32 [documents of the data set], tokens of each.
        key: (seed, place in the blend), which with the epoch keys the permutation.
    """

    def __init__(
        self,
        first: int,
        documents: np.ndarray,
        windows: np.ndarray,
        lengths: np.ndarray,
        seq_length: int,
        key: tuple[int, int],
    ) -> None:
        self.first, self.last = first, first + len(documents)
        self.seq_length = seq_length
        self.samples = len(windows)
        self._windows = windows
        self._key = key
        ends = np.cumsum(lengths[documents], dtype=np.int64)
        self._starts = np.empty(len(documents), np.int64)
        self._starts[documents - first] = ends - lengths[documents]

    def window(self, documents: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """The window that the token ``offset`` of each of the split's ``documents`` lies in."""
        return (self._starts[documents - self.first] + offset) // self.seq_length

    def first_cut(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each of the split's ``documents`` before a window begins; the next ones follow every seq_length."""
        return -self._starts[documents - self.first] % self.seq_length

    def times_read(self, windows: np.ndarray, drawn: int) -> np.ndarray:
        """How often each of ``windows`` is among the first ``drawn`` samples: int32; 0 for what is no window."""
        epochs, rest = divmod(drawn, self.samples)
        times = np.full(self.samples + 1, epochs, np.int32)
        times[-1] = 0
        wanted = np.zeros(self.samples + 1, bool)
        wanted[np.minimum(windows, self.samples)] = True
        if rest:
            slots = np.flatnonzero(wanted[self._windows])
            permutation = RandomPermutation(self.samples, (*self._key, epochs))
            times[self._windows[slots]] += permutation.places(slots) < rest
        return times[np.minimum(windows, self.samples)]


class PackedOrder(EpochOrder):
    """The same of a split whose documents are packed (best_fit.py).

    Args:
        begins, pieces: as ``best_fit.pack`` returns them, with the numbers of documents in the data set.
        lengths: int32 [documents of the split], tokens of each.
    """

    def __init__(
        self,
        first: int,
        lengths: np.ndarray,
        begins: np.ndarray,
        pieces: np.ndarray,
        seq_length: int,
        key: tuple[int, int],
    ) -> None:
        self.first, self.last = first, first + len(lengths)
        self.seq_length = seq_length
        self.samples = len(begins) - 1
        self._windows = np.arange(self.samples)
        self._key = key
        number = -(-lengths // seq_length).astype(np.int64)
        self._starts = np.cumsum(number) - number  # of each document in the table of pieces
        self._sequence = np.empty(len(pieces), np.int64)
        place = self._starts[pieces[:, 0] - first] + pieces[:, 1]
        self._sequence[place] = np.repeat(self._windows, np.diff(begins))

    def window(self, documents: np.ndarray, offset: np.ndarray) -> np.ndarray:
        place = self._starts[documents - self.first] + offset // self.seq_length
        return self._sequence[np.minimum(place, len(self._sequence) - 1)]

    def first_cut(self, documents: np.ndarray) -> np.ndarray:
        return np.zeros(len(documents), np.int64)


@dataclass(frozen=True)
class Reading:
    """The samples number ``start`` .. ``stop`` - 1 that were drawn from ``order``."""

    order: EpochOrder
    start: int
    stop: int

    def times(self, windows: np.ndarray) -> np.ndarray:
        until = self.order.times_read(windows, self.stop)
        return until - self.order.times_read(windows, self.start) if self.start else until


@dataclass(frozen=True)
class Tally:
    """What was read more often (``again``) or less often (``skipped``) than a run takes for granted.

    ``windows_again``: windows of that run which hold such a token, None where it was not counted. ``exact``: False
    where the numbers are estimates from a sample of the documents.
    """

    tokens_again: int = 0
    documents_again: int = 0
    windows_again: int | None = 0
    tokens_skipped: int = 0
    documents_skipped: int = 0
    exact: bool = True

    def __add__(self, other: Tally) -> Tally:
        counted = self.windows_again is not None and other.windows_again is not None
        return Tally(
            self.tokens_again + other.tokens_again,
            self.documents_again + other.documents_again,
            (self.windows_again or 0) + (other.windows_again or 0) if counted else None,
            self.tokens_skipped + other.tokens_skipped,
            self.documents_skipped + other.documents_skipped,
            self.exact and other.exact,
        )


@dataclass(frozen=True)
class _Pieces:
    """Parts of documents that lie within one window of every order: each was read as a whole, or not at all."""

    document: np.ndarray
    offset: np.ndarray
    tokens: np.ndarray
    documents_each: float
    """How many documents a chosen one stands for; 1 where all were chosen."""
    tokens_each: float

    def windows(self, order: EpochOrder) -> np.ndarray:
        """The window of each piece in ``order``; past the last one outside its split."""
        inside = (order.first <= self.document) & (self.document < order.last)
        window = order.window(np.where(inside, self.document, order.first), self.offset)
        return np.where(inside, window, order.samples)

    def times(self, readings: Sequence[Reading]) -> np.ndarray:
        total = np.zeros(len(self.document), np.int32)
        for reading in readings:
            total += reading.times(self.windows(reading.order))
        return total

    def documents(self, chosen: np.ndarray) -> int:
        """Number of documents that have a piece of ``chosen`` (bool [pieces])."""
        return round(len(_distinct(self.document[chosen])) * self.documents_each)


def compare(lengths: np.ndarray, read: Sequence[Reading], assumed: Sequence[Reading]) -> Tally:
    """What was ``read`` of a data set against what the run that goes on takes for read.

    Args:
        lengths: int32 [documents], tokens of each.
    """
    orders = [reading.order for reading in (*read, *assumed)]
    if not orders:
        return Tally()
    first, last = min(order.first for order in orders), max(order.last for order in orders)
    pieces, exact = _cut(lengths, first, last, orders)
    ahead = [(pieces.windows(reading.order), reading.order.samples) for reading in assumed]
    comes = np.zeros(len(pieces.document), bool)  # not what has left the training split
    for windows, samples in ahead:
        comes |= windows < samples
    more = pieces.times(read) - pieces.times(assumed)
    again, skipped = (more > 0) & comes, more < 0
    touched = 0
    for windows, samples in ahead:
        hit = np.zeros(samples + 1, bool)
        hit[windows[again]] = True
        touched += int(np.count_nonzero(hit[:samples]))
    return Tally(
        round(int((pieces.tokens[again] * more[again]).sum()) * pieces.tokens_each),
        pieces.documents(again),
        touched if exact else None,
        round(int((pieces.tokens[skipped] * -more[skipped]).sum()) * pieces.tokens_each),
        pieces.documents(skipped),
        exact,
    )


def documents_read(lengths: np.ndarray, first: int, last: int, read: Sequence[Reading]) -> int:
    """How many of the documents ``first`` .. ``last`` - 1 were read, if only in part; exact as ``compare`` is."""
    read = [reading for reading in read if reading.order.first < last and first < reading.order.last]
    if not read or first >= last:
        return 0
    pieces, _ = _cut(lengths, first, last, [reading.order for reading in read])
    return pieces.documents(pieces.times(read) > 0)


def _cut(lengths: np.ndarray, first: int, last: int, orders: Sequence[EpochOrder]) -> tuple[_Pieces, bool]:
    """The pieces of the documents ``first`` .. ``last`` - 1, or of a sample of them; whether it is all of them."""
    total = int(lengths[first:last].sum(dtype=np.int64))
    pieces = last - first + sum(total // order.seq_length for order in orders)
    if pieces <= EXACT_PIECES:
        chosen = np.arange(first, last)
    else:
        size = max(1, (last - first) * EXACT_PIECES // pieces)
        chosen = _distinct(np.sort(np.random.default_rng(0).integers(first, last, size)))
    documents_each = (last - first) / max(1, len(chosen))
    tokens = lengths[chosen].astype(np.int64)
    chosen, tokens = chosen[tokens > 0], tokens[tokens > 0]
    ends = np.cumsum(tokens)
    begins = ends - tokens
    every = np.concatenate([begins, *(_cuts(order, chosen, begins, tokens) for order in orders)])
    every.sort(kind="stable")  # which merges what is sorted in parts
    cuts = _distinct(every)
    row = np.searchsorted(begins, cuts, side="right") - 1
    sampled = int(ends[-1]) if len(ends) else 0
    sizes = np.diff(np.append(cuts, sampled))
    made = _Pieces(chosen[row], cuts - begins[row], sizes, documents_each, total / max(1, sampled))
    return made, pieces <= EXACT_PIECES


def _distinct(ascending: np.ndarray) -> np.ndarray:
    """The values of a sorted array, each once; ``np.unique`` hashes, which takes many times as long."""
    return ascending[np.append(True, ascending[1:] != ascending[:-1])[: len(ascending)]]


def _cuts(order: EpochOrder, documents: np.ndarray, begins: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Where windows of ``order`` begin inside ``documents``, which are laid out at ``begins``."""
    inside = (order.first <= documents) & (documents < order.last)
    documents, begins, tokens = documents[inside], begins[inside], tokens[inside]
    offset = order.first_cut(documents)
    number = np.maximum(0, -(-(tokens - offset) // order.seq_length))
    before = np.cumsum(number) - number
    step = np.arange(int(number.sum())) - np.repeat(before, number)
    return np.repeat(begins + offset, number) + step * order.seq_length
