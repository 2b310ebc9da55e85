"""No sample of a source comes twice before its epoch ends, whatever becomes of the blend, the ranks and the run."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest

from megatron_sgt.data import blend, ledger
from megatron_sgt.data.blend import Blend
from megatron_sgt.data.gpt_dataset import BlendedSamples
from megatron_sgt.data.history import INDEXED, DataFile, DataOrder
from megatron_sgt.data.ledger import Former, Ledger, Place, Progress, Span, ledger_from_json
from megatron_sgt.data.loader import sample_ids
from megatron_sgt.errors import CheckpointError

SIZES = {"a": 23, "b": 7, "c": 40, "d": 1, "e": 12, "a+": 31, "a++": 50, "e+": 13}
"""Samples of an epoch of each data set; ``a+`` is ``a`` with documents appended."""


def family(content: str) -> str:
    return content.rstrip("+")


def begins(old: DataFile, new: DataFile) -> bool:
    return old.content != new.content and new.content.startswith(old.content)


def order(*weighted: tuple[float, str, str], seq_length: int = 16, seed: int = 3) -> DataOrder:
    """Of (weight, prefix, content)."""
    total = sum(weight for weight, _, _ in weighted)
    files = tuple(
        DataFile(weight / total, prefix, SIZES[content], 16 * SIZES[content] + 1, content, content, SIZES[content])
        for weight, prefix, content in weighted
    )
    return DataOrder(INDEXED, seq_length, seed, "1", (1.0, 0.0, 0.0), files)


def plain(*weighted: tuple[float, str], **settings: int) -> DataOrder:
    return order(*((weight, content, content) for weight, content in weighted), **settings)


class Epoch:
    """One epoch of so many samples."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


def samples_of(span: Span) -> BlendedSamples:
    """The samples that a run reads in ``span``."""
    files, places = span.order.files, span.drawing.places
    parts = [Epoch(file.samples) for file in files]
    made = BlendedSamples(parts, [1.0] * len(files), span.order.seed, True, 9, [file.prefix for file in files])
    former = [Epoch(place.former.samples) if place.former else None for place in places]
    made.draw(span.drawing, range(len(files)), former)
    return made


Drawn = tuple[str, int, int]
"""(content that it is known by, number of the sample, size of an epoch that begins there)."""


@dataclass
class Run:
    """A run as its user sees it. ``read``: what it has trained on or passed over, by sample index."""

    random: random.Random
    held: dict[str, str]
    """By content: under which name it lies."""
    ledger: Ledger
    consumed: int = 0
    read: dict[int, Drawn] = field(default_factory=dict)

    def train(self) -> None:
        """Some steps under one data-parallel layout."""
        dp_size, size, micro_batches = (self.random.randint(1, 3) for _ in range(3))
        span = self.ledger.now
        samples = samples_of(span)
        for _ in range(self.random.randint(0, 6)):
            ids = [
                index
                for rank in range(dp_size)
                for batch in range(micro_batches)
                for index in sample_ids(self.consumed, batch, size, rank, dp_size)
            ]
            for index in ids:
                _, number = samples.locate(index)
                source, _ = span.drawing[index]
                content = span.order.files[source].content
                self.read[index] = family(content), number, SIZES[content]
            self.consumed += len(ids)

    def turn(self) -> None:
        """Other weights, other sources, other names, other places in the list, more documents."""
        for content in list(self.held):
            if self.random.random() < 0.15 and content + "+" in SIZES:
                self.held[content + "+"] = self.held.pop(content)
            elif self.random.random() < 0.2:
                self.held[content] = f"{content} at {self.random.randrange(99)}"
        chosen = self.random.sample(sorted(self.held), self.random.randint(1, len(self.held)))
        wanted = order(*((self.random.uniform(1, 9), self.held[content], content) for content in chosen))
        self.ledger = self.ledger.turned(wanted, self.consumed, begins)

    def save(self) -> tuple[int, str]:
        return self.consumed, json.dumps(self.ledger.to_json())

    def go_back(self, saved: tuple[int, str], skip: int) -> None:
        """To a checkpoint; after a loss spike ``skip`` samples are passed over."""
        self.consumed, self.ledger = saved[0], ledger_from_json(json.loads(saved[1]))
        self.read = {index: drawn for index, drawn in self.read.items() if index < self.consumed}
        self.turn()
        samples, span = samples_of(self.ledger.now), self.ledger.now
        for index in range(self.consumed, self.consumed + skip):
            content = span.order.files[span.drawing[index][0]].content
            self.read[index] = family(content), samples.locate(index)[1], SIZES[content]
        self.consumed += skip


def history(seed: int) -> Run:
    chance = random.Random(seed)
    held = {content: content for content in ("a", "b", "c", "d", "e")}
    run = Run(chance, held, Ledger((Span(0, plain((3, "a"), (1, "b"))),)))
    saved = [run.save()]
    for _ in range(chance.randint(4, 12)):
        run.train()
        if chance.random() < 0.6:
            run.turn()
        if chance.random() < 0.5:
            saved.append(run.save())
        if chance.random() < 0.25:
            back = chance.choice(saved)
            saved = [one for one in saved if one[0] <= back[0]]
            grown = set(run.held)
            run.go_back(back, chance.choice((0, 0, 5)))
            assert set(run.held) <= grown | {one + "+" for one in grown}
    run.train()
    return run


def early(run: Run) -> Iterator[str]:
    """Samples that come again although others of their source's epoch have not come yet."""
    seen: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    assert sorted(run.read) == list(range(run.consumed)), "every index is read once"
    for index in range(run.consumed):
        source, number, size = run.read[index]
        epoch = seen.setdefault(source, set())
        if not epoch:
            sizes[source] = size
        if number in epoch or number >= sizes[source]:
            yield f"sample {number} of {source} at {index}"
        epoch.add(number)
        if len(epoch) == sizes[source]:
            epoch.clear()


@pytest.fixture
def short_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend, "PERIOD", 64)
    monkeypatch.setattr(ledger, "blend_of", lru_cache(Blend))


def test_no_sample_comes_twice_before_its_epoch_ends(short_periods: None) -> None:
    reached = set()
    for seed in range(120):
        run = history(seed)
        assert not (wrong := list(early(run))), f"history {seed}: {wrong[:3]}"
        counts: dict[tuple[str, int], int] = {}
        for source, number, _ in run.read.values():
            counts[source, number] = counts.get((source, number), 0) + 1
        for source in {source for source, _ in counts} & set("bcd"):  # whose epochs are of one length
            each = [counts.get((source, number), 0) for number in range(SIZES[source])]
            total = sum(each)
            assert {min(each), max(each)} <= {total // len(each), -(-total // len(each))}, f"history {seed}: {source}"
        reached |= {(place.former is not None, len(run.ledger.spans) > 3) for place in run.ledger.now.drawing.places}
    assert len(reached) == 4, "the histories have what they are about"


def test_the_rule_of_earlier_versions_would_not_do(short_periods: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(self: Ledger, order: DataOrder, consumed: int, begins: Any) -> Ledger:
        return Ledger((*(read.span for read in self.until(consumed)), Span(consumed, order)))

    monkeypatch.setattr(Ledger, "turned", turned)
    assert any(list(early(history(seed))) for seed in range(5))


def test_a_run_whose_blend_never_changes_draws_as_ever() -> None:
    wanted = plain((3, "a"), (1, "b"))
    made, old = samples_of(Ledger((Span(0, wanted),)).turned(wanted, 40, begins).now), Blend([0.75, 0.25])
    assert [made._drawing[index] for index in range(300)] == [
        (d, Place(d, rank)) for d, rank in map(old.__getitem__, range(300))
    ]
    [entry] = Ledger((Span(0, wanted),)).to_json()
    assert entry.keys() == {"from_sample", "dataset", "seq_length", "seed", "split", "shares", "files"}


def test_records_of_earlier_versions_say_what_was_drawn() -> None:
    """Their spans drew ``Blend(weights)[i]`` with the places of the sources as numbers."""
    one, two, three = plain((3, "a"), (1, "b")), plain((1, "a"), (9, "b")), plain((1, "b"), (1, "c"), (1, "a"))
    record = [
        {k: v for k, v in entry.items() if k not in ("places", "origin")}
        for entry in Ledger((Span(0, one), Span(20, two))).to_json()
    ]
    before = ledger_from_json(record)
    assert before.until(25)[1].span.drawing[24] == (1, Place(1, Blend([0.1, 0.9])[24][1]))
    after = before.turned(three, 25, begins).now
    read_first, read_second = Blend([0.75, 0.25]).drawn(20), Blend([0.1, 0.9]).drawn(25)
    assert read_second[0] < read_first[0], "source a went back"
    assert after.places == (Place(1, read_second[1]), Place(2), Place(0, read_first[0]))
    assert (after.start, after.origin) == (25, 25)


def test_documents_appended_come_with_the_next_epoch() -> None:
    begun = Ledger((Span(0, plain((1, "a"))),))
    grown = begun.turned(plain((1, "a+")), 30, begins)
    assert grown.now.places == (Place(0, 2 * 31, Former(23, 23, 30)),)
    samples = samples_of(grown.now)
    rest, whole = [samples.locate(i) for i in range(30, 46)], [samples.locate(i) for i in range(46, 77)]
    assert {d for d, _ in rest} == {1} and len({j for _, j in rest}) == 16
    assert {d for d, _ in whole} == {0} and sorted(j for _, j in whole) == list(range(31))
    again = grown.turned(plain((1, "a++"), (1, "b")), 40, begins)
    assert again.now.places == (Place(0, 2 * 50, Former(23, 23, 40)), Place(1))
    assert begun.turned(plain((1, "a+")), 46, begins).now.places == (Place(0, 2 * 31),), "between two epochs"


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"seq_length": 32}, Place(0, 23 + 4)),
        ({"seq_length": 8}, Place(0, 23 + 14)),
        ({"seq_length": 1}, Place(0, 23 + 23)),
        ({"seed": 4}, Place(0, 23 + 7)),
    ],
)
def test_samples_of_another_length_begin_at_as_many_tokens(settings: dict[str, int], place: Place) -> None:
    begun = Ledger((Span(0, plain((1, "a"))),))
    assert begun.turned(plain((1, "a"), **settings), 23 + 7, begins).now.places == (place,)


def test_progress_is_counted_in_tokens() -> None:
    one, two = plain((3, "a"), (1, "b")), plain((1, "a+"), (1, "c"), seq_length=32)
    run = Ledger((Span(0, one),)).turned(two, 40, begins)
    assert run.tokens(50) == 40 * 16 + 10 * 32
    found = run.progress(50)
    assert {name: one.tokens for name, one in found.items()} == {"a+": 30 * 16 + 5 * 32, "b": 160, "c": 160}
    assert run.progress(0) == {} and run.progress(40)["b"] == Progress("b", 160, 10 / 7)
    twice = Ledger((Span(0, order((1, "x", "b"), (1, "x", "b"))),)).progress(8)
    assert {name: one.tokens for name, one in twice.items()} == {"x": 64, "x (2)": 64}
    assert Ledger((Span(8, one),)).tokens(10) == 160, "what came before the record counts, too"


@pytest.mark.parametrize("record", [[{}], [3], "x", [{"from_sample": 9, "files": 4}], None, []])
def test_a_damaged_record_is_refused(record: Any) -> None:
    with pytest.raises(CheckpointError, match="record of the data is damaged"):
        ledger_from_json(record)


def test_a_record_whose_parts_do_not_fit_is_refused() -> None:
    one, two = plain((3, "a"), (1, "b")), plain((1, "b"))
    kept = Ledger((Span(0, one),)).turned(two, 9, begins).to_json()
    assert ledger_from_json(json.loads(json.dumps(kept))).to_json() == kept
    with pytest.raises(CheckpointError, match="follow"):
        ledger_from_json(kept[::-1])
    kept[1]["places"] *= 2
    with pytest.raises(CheckpointError, match="places"):
        ledger_from_json(kept)
