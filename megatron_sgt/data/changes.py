"""What a changed order of the data means for the run that goes on: where its sources stand, what comes again or leaks.

Another blend, and documents that were appended, repeat and skip nothing: the ledger goes on in each source where it was
(ledger.py). Under another ``seq_length``, seed or split the samples of a source are other tokens, and it goes on at as
many tokens of the same epoch: what that repeats and skips is counted here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_sgt.data.history import INDEXED, DataFile, DataOrder
from megatron_sgt.data.index_cache import open_split
from megatron_sgt.data.indexed import lengths_digest, sequence_lengths
from megatron_sgt.data.ledger import Begins, Continued, Place, Read, Span, go_on
from megatron_sgt.data.listing import counted, listed
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

    ``differences``: what was changed. ``places``: how the sources go on, in words. ``tally``: None where something is
    not known. ``held_out_trained``: documents that were held out and are trained on from now on;
    ``trained_held_out``: the reverse. ``unknown``: what could not be told.
    """

    differences: tuple[str, ...]
    places: tuple[str, ...] = ()
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
        yield from self.places
        if self.tally is None:
            return
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


def find_change(reads: Sequence[Read], now: Span, begins: Begins, indices: Indices) -> Change | None:
    """What it means that ``reads`` were read and the next samples come as ``now`` says.

    None where that is the order of the last ones, or nothing was read. The numbers are exact up to
    ``order.EXACT_PIECES``; samples that a run has passed over after a loss spike count as read.
    """
    if not reads or reads[-1].order.same(now.order):
        return None
    last, order = reads[-1].order, now.order
    change = Change(tuple(last.differences(order)))
    if any(one.dataset != INDEXED for one in (order, *(read.order for read in reads))):
        return replace(change, unknown=("what is read again or skipped of a registered data set is not known",))
    ways = go_on(reads, order, begins)
    found = [_File(file, places, reads, now, begins, indices) for file, places in _distinct(order)]
    moved = [one for one in found if any(ways[place].kind == "moved" for place in one.places)]
    begun = reads[0].start
    return replace(
        change,
        places=tuple(_places(last, order, ways)),
        tally=None if begun else sum((one.tally() for one in moved), Tally()),
        held_out_trained=sum(one.held_out_trained() for one in found),
        trained_held_out=sum(one.trained_held_out() for one in found),
        unknown=(
            *([f"what was read before sample {begun:,} is not recorded"] if begun else []),
            *(
                f"{file.prefix} is other data than before: which of it was read or held out is not known"
                for _, file in changed_files(reads, order, begins)
            ),
        ),
    )


def _places(last: DataOrder, now: DataOrder, ways: Sequence[Continued]) -> Iterator[str]:
    """How the sources of a blend go on; ``last``: the order before."""
    named = [file.prefix for file in now.files]
    going_on = [name for name, way in zip(named, ways, strict=True) if way.kind in ("same", "grown")]
    if going_on and len(named) > 1:
        yield f"{listed(going_on)} {'goes' if len(going_on) == 1 else 'go'} on where {_it(going_on)} last stopped"
    for file, way in zip(now.files, ways, strict=True):
        if way.kind == "moved" or (way.kind == "same" and len(named) == 1):
            epoch, sample = divmod(way.place.drawn, file.samples)
            of = f"{file.prefix} " if len(named) > 1 else ""
            yield f"{of}goes on at sample {sample:,} of {file.samples:,} of epoch {epoch + 1:,}"
        if way.kind == "grown" and way.then is not None:
            more = counted(file.documents - way.then.documents, "document")
            first = (
                "" if way.place.former is None else f", after the {way.place.former.rest:,} samples left of its epoch"
            )
            yield f"{file.prefix}: the {more} appended come with its next epoch{first}"
    if new := [name for name, way in zip(named, ways, strict=True) if way.kind == "new"]:
        yield f"{listed(new)} {'begins' if len(new) == 1 else 'begin'}"
    kept = {
        way.then.holds for way in ways if way.then is not None
    }  # which an earlier span may have had at other weights
    if left := [file.prefix for file in last.files if file.holds not in kept]:
        yield f"{listed(left)} {'is' if len(left) == 1 else 'are'} not read on"


def _it(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "they"


class _File:
    """One data set of ``now``, at its ``places`` in the blend, and where it was read."""

    def __init__(
        self,
        file: DataFile,
        places: Sequence[int],
        reads: Sequence[Read],
        now: Span,
        begins: Begins,
        indices: Indices,
    ) -> None:
        self.file, self.places, self._now, self._indices = file, places, now, indices
        self._lengths = sequence_lengths(file.prefix)
        self._then = [
            (read, place)
            for read in reads
            for place, old in enumerate(read.order.files)
            if old.same(file) or begins(old, file)
        ]

    def _read(self) -> list[Reading]:
        return [
            reading
            for read, place in self._then
            for reading in self._readings(read.order, place, read.before()[place], read.after()[place])
        ]

    def tally(self) -> Tally:
        assumed = [
            reading
            for place in self.places
            for there in (self._now.drawing.before(self._now.start)[place],)
            for reading in self._readings(self._now.order, place, Place(there.number), replace(there, former=None))
        ]
        return compare(self._lengths, self._read(), assumed)

    def held_out_trained(self) -> int:
        held = [bound for read, place in self._then for bound in read.order.bounds(place)[1:]]
        trained = [self._now.order.bounds(place)[0] for place in self.places]
        return sum(last - first for first, last in _common(held, trained))

    def trained_held_out(self) -> int:
        held = _union(bound for place in self.places for bound in self._now.order.bounds(place)[1:])
        trained = [read.order.bounds(place)[0] for read, place in self._then]
        if not _common(held, trained):
            return 0
        read = self._read()
        return sum(documents_read(self._lengths, first, last, read) for first, last in held)

    def _readings(self, order: DataOrder, place: int, before: Place, after: Place) -> Iterator[Reading]:
        """The samples of file number ``place`` of ``order`` that were drawn between two places."""
        for documents, start, stop in before.parts(after):
            if stop > start:
                number = order.files[place].documents if documents is None else documents
                yield Reading(self._order(order, number, before.number), start, stop)

    def _order(self, order: DataOrder, documents: int, number: int) -> EpochOrder:
        lengths, about, key = self._lengths, (order.seq_length, order.seed), (order.seed, number)
        parts = order.parts(lengths[:documents])
        digest = lengths_digest(lengths[:documents])
        folder = self._indices(self.file.prefix, parts, digest, *about, order.packing)
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


def changed_files(reads: Sequence[Read], now: DataOrder, begins: Begins) -> list[tuple[DataFile, DataFile]]:
    """(then, now) of the files that hold something else than what was read under their names."""
    old = [file for read in reads for file in read.order.files]
    unknown = [file for file in now.files if not any(one.same(file) or begins(one, file) for one in old)]
    by_name = {os.path.abspath(file.prefix): file for file in old}
    names = ((by_name.get(os.path.abspath(file.prefix)), file) for file in unknown)
    return [(then, file) for then, file in names if then is not None]


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
