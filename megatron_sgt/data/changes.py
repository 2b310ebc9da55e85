"""What a run that goes on reads again, skips or leaks when the order of its data is not the one that it began with.

The place of a run in its data is a count of samples. Under another ``seq_length``, seed, blend, split or other files
the same count means another place, and the samples behind it are other tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_sgt.data.blend import Blend
from megatron_sgt.data.history import INDEXED, DataFile, DataOrder, Span
from megatron_sgt.data.index_cache import open_split
from megatron_sgt.data.indexed import sequence_lengths
from megatron_sgt.data.listing import counted
from megatron_sgt.data.order import EpochOrder, PackedOrder, Reading, Tally, compare, documents_read
from megatron_sgt.data.packed_index import open_packing
from megatron_sgt.data.splits import SplitPart

Range = tuple[int, int]
Indices = Callable[[str, tuple[SplitPart, ...], str, int, int, str], str]
"""(prefix, parts, digest of the lengths, seq_length, seed, packing) -> the folder of these sample indices, built if
need be."""


@dataclass(frozen=True)
class Change:
    """What a changed order means for the run that goes on.

    ``differences``: what was changed. ``sample`` of ``samples``: where it goes on in its epoch number ``epoch`` (from
    1); None for a blend, whose data sets have epochs of their own. ``held_out_trained``: documents that were held out
    and are trained on from now on; ``trained_held_out``: the reverse. ``unknown``: what could not be told.
    """

    differences: tuple[str, ...]
    consumed: int
    sample: int | None = None
    samples: int | None = None
    epoch: int | None = None
    tally: Tally | None = None
    held_out_trained: int = 0
    trained_held_out: int = 0
    unknown: tuple[str, ...] = ()

    @property
    def leaks(self) -> bool:
        return self.held_out_trained + self.trained_held_out > 0

    def line(self) -> str:
        """All of it, for a person."""
        return f"{'; '.join(self.differences)}: {'; '.join([*self._place(), *self._leak(), *self.unknown])}"

    def problem(self) -> str:
        """Why a run that leaks is refused, and what to do."""
        return (
            f"{'; '.join(self.differences)}: {'; '.join(self._leak())}, so that validation would measure what was "
            "trained on; go back to the former setting, or set data.allow_validation_leak: true to go on all the same"
        )

    def _place(self) -> Iterator[str]:
        if self.tally is None:
            return
        at = f"sample {self.consumed:,} of the blend"
        if self.sample is not None:
            at = f"sample {self.sample:,} of {self.samples:,} of epoch {self.epoch:,}"
        yield f"goes on at {at}"
        tally, about = self.tally, "" if self.tally.exact else "about "
        windows = f", {counted(tally.windows_again, 'window')}" if tally.windows_again else ""
        again = f"{counted(tally.documents_again, 'document')} ({tally.tokens_again:,} tokens{windows})"
        skipped = f"{counted(tally.documents_skipped, 'document')} ({tally.tokens_skipped:,} tokens)"
        if tally.tokens_again:
            yield f"read before and to come again: {about}{again}"
        if tally.tokens_skipped:
            yield f"skipped: {about}{skipped}"
        if not tally.tokens_again and not tally.tokens_skipped:
            yield "nothing is read again or skipped"

    def _leak(self) -> Iterator[str]:
        if self.held_out_trained:
            count = counted(self.held_out_trained, "document")
            yield f"held out for validation or test so far, and trained on now: {count}"
        if self.trained_held_out:
            count = counted(self.trained_held_out, "document")
            yield f"trained on so far, and held out for validation or test now: {count}"


def find_change(spans: Sequence[Span], now: DataOrder, indices: Indices) -> Change | None:
    """What it means that samples were read as ``spans`` say and the next ones come in the order ``now``.

    None where that is the order of the last span, or nothing was read. The numbers are exact up to
    ``order.EXACT_PIECES``; samples that a run has passed over after a loss spike count as read.
    """
    if not spans or not spans[-1].stop or spans[-1].order.same(now):
        return None
    consumed = spans[-1].stop
    change = Change(tuple(spans[-1].order.differences(now)), consumed)
    if any(order.dataset != INDEXED for order in (now, *(span.order for span in spans))):
        return replace(change, unknown=("what is read again or skipped of a registered data set is not known",))
    found = [_File(file, places, spans, now, indices) for file, places in _distinct(now)]
    begun = spans[0].start
    tally = None if begun else sum((file.tally() for file in found), Tally())
    if len(now.files) == 1:
        epoch, sample = divmod(consumed, found[0].samples)
        change = replace(change, sample=sample, samples=found[0].samples, epoch=epoch + 1)
    return replace(
        change,
        tally=tally,
        held_out_trained=sum(file.held_out_trained() for file in found),
        trained_held_out=sum(file.trained_held_out() for file in found),
        unknown=(
            *([f"what was read before sample {begun:,} is not recorded"] if begun else []),
            *_replaced(spans, now, found),
        ),
    )


class _File:
    """One data set of the blend, perhaps at several places of it, and what was read of it."""

    def __init__(
        self, file: DataFile, places: Sequence[int], spans: Sequence[Span], now: DataOrder, indices: Indices
    ) -> None:
        self.file, self._places, self._now, self._indices = file, places, now, indices
        self._lengths = sequence_lengths(file.prefix)
        drawn = _drawn(now, spans[-1].stop)
        self._assumed = [Reading(self._order(now, place), 0, drawn[place]) for place in places]
        self.samples = self._assumed[0].order.samples
        self.then = [
            (span, place)
            for span in spans
            for place, old in enumerate(span.order.files)
            if old.same(file) or old.begins(file, self._lengths)
        ]
        self._read = [
            Reading(
                self._order(span.order, place),
                _drawn(span.order, span.start)[place],
                _drawn(span.order, span.stop)[place],
            )
            for span, place in self.then
        ]

    def tally(self) -> Tally:
        return compare(self._lengths, self._read, self._assumed)

    def held_out_trained(self) -> int:
        held = [bound for span, place in self.then for bound in span.order.bounds(place)[1:]]
        trained = [self._now.bounds(place)[0] for place in self._places]
        return sum(last - first for first, last in _common(held, trained))

    def trained_held_out(self) -> int:
        held = _union(bound for place in self._places for bound in self._now.bounds(place)[1:])
        return sum(documents_read(self._lengths, first, last, self._read) for first, last in held)

    def _order(self, order: DataOrder, place: int) -> EpochOrder:
        parts = order.parts(place, self._lengths)
        about = (order.seq_length, order.seed)
        folder = self._indices(self.file.prefix, parts, order.files[place].lengths, *about, order.packing)
        lengths = self._lengths
        key = (order.seed, place)
        if order.packing == "best_fit":
            packed = lengths[parts[0].first : parts[0].last]
            return PackedOrder(parts[0].first, packed, *open_packing(folder, parts[0]), order.seq_length, key)
        index = open_split(self.file.prefix, parts[0], *about, folder)
        return EpochOrder(parts[0].first, index.document_index, index.shuffle_index, lengths, order.seq_length, key)


def _distinct(now: DataOrder) -> list[tuple[DataFile, list[int]]]:
    """The data sets of a blend, each once, with its places."""
    found: dict[tuple[str, str], list[int]] = {}
    for place, file in enumerate(now.files):
        found.setdefault((file.lengths, file.content), []).append(place)
    return [(now.files[places[0]], places) for places in found.values()]


def _drawn(order: DataOrder, samples: int) -> tuple[int, ...]:
    return Blend([file.weight for file in order.files]).drawn(samples)


def _replaced(spans: Sequence[Span], now: DataOrder, found: Sequence[_File]) -> Iterator[str]:
    """Files that were put into the place of others: nothing is known of what they share with these."""
    known = {file.file.prefix for file in found if file.then}
    read = {file.prefix for span in spans for file in span.order.files}
    for prefix in sorted({file.prefix for file in now.files} & read - known):
        yield f"{prefix} is other data than before: which of it was read or held out is not known"


def _union(ranges: Iterable[Range]) -> list[Range]:
    merged: list[Range] = []
    for first, last in sorted(bound for bound in ranges if bound[0] < bound[1]):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged


def _common(one: Iterable[Range], other: Iterable[Range]) -> list[Range]:
    right = _union(other)
    pairs = ((max(a, c), min(b, d)) for a, b in _union(one) for c, d in right)
    return [(first, last) for first, last in pairs if first < last]
