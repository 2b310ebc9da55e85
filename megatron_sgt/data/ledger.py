"""How much a run has drawn from each source of its data, while its blend changes. No torch, reads no data.

A run is a chain of spans. In each, sample i is the one that ``Blend(weights)[i - origin]`` names, and every source goes
on at its own count of drawn samples: the samples are a function of (seed, ledger, sample index). A source is known by
what it holds, wherever it lies, and keeps the number that it got when it first appeared, which is in the key of its
permutations. A span that starts a run has the origin 0, counts of 0 and the places in the blend as numbers; so has
every span of versions that drew ``Blend(weights)[i]`` whatever came before, which therefore need no rule of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from megatron_sgt.data.blend import Blend
from megatron_sgt.data.history import DataFile, DataOrder, Key, order_from_json
from megatron_sgt.errors import CheckpointError

blend_of = lru_cache(maxsize=32)(Blend)
"""The layout of a tuple of weights, made once."""
Begins = Callable[[DataFile, DataFile], bool]
"""Whether the second file is the first one with documents appended."""
Kind = Literal["new", "same", "grown", "moved"]
"""How a source goes on: it is new; exactly where it was; so, with documents appended; about there, as its samples are
cut or shuffled otherwise."""


@dataclass(frozen=True)
class Former:
    """The rest of an epoch over the first ``documents`` of a source, which comes before those appended later.

    ``samples``: of such an epoch; ``drawn``: how many were drawn, those of earlier epochs included.
    """

    documents: int
    samples: int
    drawn: int

    @property
    def rest(self) -> int:
        return -self.drawn % self.samples


@dataclass(frozen=True)
class Place:
    """Where a source stands. ``drawn``: samples, as if all epochs before had been of the present length."""

    number: int
    drawn: int = 0
    former: Former | None = None

    def after(self, samples: int) -> Place:
        """Where it stands after so many more."""
        if self.former is None:
            return Place(self.number, self.drawn + samples)
        if samples < self.former.rest:
            return replace(self, former=replace(self.former, drawn=self.former.drawn + samples))
        return Place(self.number, self.drawn + samples - self.former.rest)

    def parts(self, later: Place) -> Iterator[tuple[int | None, int, int]]:
        """(documents, first, last + 1) of the samples from here to ``later``; None: of all documents."""
        if self.former is not None:
            whole = self.former.drawn + self.former.rest
            yield self.former.documents, self.former.drawn, whole if later.former is None else later.former.drawn
        if later.former is None:
            yield None, self.drawn, later.drawn

    def epochs(self, samples: int) -> float:
        """How often the source was read; ``samples``: of its epoch."""
        return self.drawn / samples if self.former is None else self.former.drawn / self.former.samples


@dataclass(frozen=True)
class Drawing:
    """Which sample of which source each sample of a span is."""

    weights: tuple[float, ...]
    places: tuple[Place, ...]
    origin: int = 0

    @classmethod
    def from_zero(cls, weights: Sequence[float]) -> Drawing:
        return cls(tuple(weights), tuple(map(Place, range(len(weights)))))

    def __getitem__(self, index: int) -> tuple[int, Place]:
        """(d, place): sample ``index`` is the one that source d comes to at ``place``."""
        d, rank = blend_of(self.weights)[index - self.origin]
        return d, self.places[d].after(rank)

    def drawn(self, index: int) -> tuple[int, ...]:
        """How many samples before ``index`` are of each source, counted from the origin."""
        return blend_of(self.weights).drawn(index - self.origin) if self.weights else ()

    def before(self, index: int) -> tuple[Place, ...]:
        """Where each source stands when sample ``index`` comes."""
        return tuple(place.after(drawn) for place, drawn in zip(self.places, self.drawn(index), strict=True))


@dataclass(frozen=True)
class Span:
    """The samples from number ``start`` on, until the next span.

    ``places``: of its sources at ``origin``; empty for those of a span that starts a run.
    """

    start: int
    order: DataOrder
    origin: int = 0
    places: tuple[Place, ...] = ()

    @property
    def drawing(self) -> Drawing:
        weights = tuple(file.weight for file in self.order.files)
        return Drawing(weights, self.places, self.origin) if self.places else Drawing.from_zero(weights)


@dataclass(frozen=True)
class Read:
    """Samples number ``start`` .. ``stop`` - 1 of a run, read in a span."""

    span: Span
    start: int
    stop: int

    @property
    def order(self) -> DataOrder:
        return self.span.order

    def before(self) -> tuple[Place, ...]:
        return self.span.drawing.before(self.start)

    def after(self) -> tuple[Place, ...]:
        return self.span.drawing.before(self.stop)


@dataclass(frozen=True)
class Continued:
    """How a file of a blend goes on; ``then``: what it was when it was last read."""

    place: Place
    kind: Kind
    then: DataFile | None = None


@dataclass(frozen=True)
class Progress:
    """What was read of a source. ``epochs``: where it stands, None where its length is not known."""

    prefix: str
    tokens: int
    epochs: float | None


@dataclass(frozen=True)
class Ledger:
    """The spans of a run. What was read before the first one starts is not known."""

    spans: tuple[Span, ...]

    @property
    def now(self) -> Span:
        return self.spans[-1]

    def until(self, consumed: int) -> tuple[Read, ...]:
        """What a run has read that has ``consumed`` so many samples."""
        stops = [span.start for span in self.spans[1:]] + [consumed]
        reads = (Read(s, s.start, min(stop, consumed)) for s, stop in zip(self.spans, stops, strict=False))
        return tuple(read for read in reads if read.start < read.stop)

    def turned(self, order: DataOrder, consumed: int, begins: Begins) -> Ledger:
        """The ledger of a run that reads on in ``order`` from sample ``consumed`` on; what came after is forgotten."""
        reads = self.until(consumed)
        spans = tuple(read.span for read in reads)
        if not spans:
            return Ledger((Span(consumed, order),))
        if spans[-1].order.same(order):  # whose files may lie elsewhere now
            return Ledger((*spans[:-1], replace(spans[-1], order=order)))
        places = tuple(one.place for one in go_on(reads, order, begins))
        return Ledger((*spans, Span(consumed, order, consumed, places)))

    def tokens(self, consumed: int) -> int:
        """Of the first ``consumed`` samples; what is not known counts as in the first span."""
        before = min(consumed, self.spans[0].start) * self.spans[0].order.seq_length
        return before + sum((read.stop - read.start) * read.order.seq_length for read in self.until(consumed))

    def progress(self, consumed: int) -> dict[str, Progress]:
        """What the first ``consumed`` samples were of each source, by its prefix, in the order of their appearance."""
        found: dict[Key, tuple[int, Progress]] = {}
        for read in self.until(consumed):
            drawing, sources = read.span.drawing, read.order.sources()
            counts = zip(drawing.drawn(read.start), drawing.drawn(read.stop), drawing.before(read.stop), strict=True)
            for (key, file), (first, last, place) in zip(sources, counts, strict=True):
                if key not in found and read.span.places:  # documents were appended to one that has its number
                    shorter = [old for old, (number, _) in found.items() if number == place.number]
                    found = {key if old in shorter[-1:] else old: value for old, value in found.items()}
                tokens = (last - first) * read.order.seq_length + (found[key][1].tokens if key in found else 0)
                epochs = place.epochs(file.samples) if file.samples else None
                found[key] = place.number, Progress(file.prefix, tokens, epochs)
        named: dict[str, Progress] = {}
        for _, one in found.values():
            before = sum(other.prefix == one.prefix for other in named.values())
            named[f"{one.prefix} ({before + 1})" if before else one.prefix] = one
        return named

    def to_json(self) -> list[dict[str, Any]]:
        """For a checkpoint. Of a run whose blend never changed, what stands in no span is not there."""
        kept = []
        for span in self.spans:
            entry = {"from_sample": span.start, **asdict(span.order)}
            if span.order.packing == "concat":
                del entry["packing"]  # as in the checkpoints from before there was a choice
            if span.places:
                entry["origin"] = span.origin
                entry["places"] = [{k: v for k, v in asdict(place).items() if v is not None} for place in span.places]
            kept.append(entry)
        return kept


def ledger_from_json(kept: Any) -> Ledger:
    """The inverse of ``to_json``, also of a record of earlier versions.

    Raises:
        CheckpointError: the record is damaged.
    """
    try:
        spans = tuple(_span(entry) for entry in kept)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the record of the data is damaged ({error!r})") from error
    starts = [span.start for span in spans]
    if not starts or starts[0] < 0 or starts != sorted(starts):
        raise CheckpointError("the record of the data is damaged (its samples do not follow each other)")
    if any(span.places and len(span.places) != len(span.order.files) for span in spans):
        raise CheckpointError("the record of the data is damaged (its places are not those of its files)")
    return Ledger(spans)


def recorded_tokens(kept: Any, consumed: int, seq_length: int) -> int:
    """Tokens of the first ``consumed`` samples by a checkpoint's record; without one all had ``seq_length``."""
    return ledger_from_json(kept).tokens(consumed) if kept else consumed * seq_length


def _span(entry: Mapping[str, Any]) -> Span:
    places = tuple(
        Place(
            int(place["number"]),
            int(place["drawn"]),
            Former(**{name: int(place["former"][name]) for name in ("documents", "samples", "drawn")})
            if "former" in place
            else None,
        )
        for place in entry.get("places", ())
    )
    return Span(int(entry["from_sample"]), order_from_json(entry), int(entry.get("origin", 0)), places)


def go_on(reads: Sequence[Read], now: DataOrder, begins: Begins) -> tuple[Continued, ...]:
    """Where every file of ``now`` goes on after ``reads``.

    A source that was read comes to the place where it was last left, in whatever span. One that is cut or shuffled
    otherwise goes on in the same epoch, at as many tokens of it.
    """
    ends = [(read.order, read.order.sources(), read.after()) for read in reversed(reads)]
    unused = 1 + max((place.number for _, _, places in ends for place in places), default=-1)
    found = []
    for place, (key, file) in enumerate(now.sources()):
        one = _continued(ends, now, place, key, file, begins)
        if one is None:
            one, unused = Continued(Place(unused), "new"), unused + 1
        found.append(one)
    return tuple(found)


def _continued(
    ends: Sequence[tuple[DataOrder, Sequence[tuple[Key, DataFile]], tuple[Place, ...]]],
    now: DataOrder,
    place: int,
    key: Key,
    file: DataFile,
    begins: Begins,
) -> Continued | None:
    """``ends``: orders, sources and where they stood, the last first."""
    found: Continued | None = None
    for order, sources, places in ends:
        for there, (other, old) in enumerate(sources):
            if found is None and (other == key or (other[1] == key[1] and begins(old, file))):
                found = _from(order, there, places[there], now, place)
            elif found is not None and found.kind == "same" and other == key:
                # Versions that drew Blend(weights)[i] could go back within an epoch.
                earlier = _from(order, there, places[there], now, place)
                if earlier.kind == "same" and _further(earlier.place, found.place):
                    found = earlier
    return found


def _further(one: Place, other: Place) -> bool:
    return one.number == other.number and one.former == other.former and one.drawn > other.drawn


def _from(order: DataOrder, there: int, at: Place, now: DataOrder, here: int) -> Continued:
    """The file number ``there`` of ``order``, which stood ``at``, goes on as number ``here`` of ``now``."""
    old, file, former = order.files[there], now.files[here], at.former
    documents = (old.documents, old.documents if former is None else former.documents)
    if any(order.windows(there, number) != now.windows(here, number) for number in documents):
        return Continued(_moved(at, order, old, now, file), "moved", old)
    if old.same(file):
        return Continued(at, "same", old)
    assert old.samples, "what it has grown from is known in full"
    if former is None and at.drawn % old.samples:
        former = Former(old.documents, old.samples, at.drawn)
    begun = at.drawn // old.samples if former is None else former.drawn // former.samples + 1
    return Continued(Place(at.number, begun * file.samples, former), "grown", old)


def _moved(at: Place, order: DataOrder, old: DataFile, now: DataOrder, file: DataFile) -> Place:
    drawn, samples = (at.drawn, old.samples) if at.former is None else (at.former.drawn, at.former.samples)
    epoch, rest = divmod(drawn, samples)
    rest = -(-rest * order.seq_length // now.seq_length)
    return Place(at.number, epoch * file.samples + min(rest, file.samples))
