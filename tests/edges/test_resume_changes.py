"""A run that goes on under changed settings or over changed files says what it reads again and what it skips, and does
not train on what was held out. The counts are compared with lists of the tokens of every sample."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sgt.checkpoint.layout import read_json
from megatron_sgt.config import Config
from megatron_sgt.data import order
from megatron_sgt.data.changes import find_change
from megatron_sgt.data.ledger import Drawing, Ledger, Place, Span
from megatron_sgt.data.splits import split_bounds
from megatron_sgt.engine.data_start import data_start
from megatron_sgt.errors import CheckpointError
from megatron_sgt.preflight import find_start
from tests.helpers.changing_data import LENGTHS, STARTS, Data, real, write_data_sets
from tests.helpers.commands import run_script, snapshot
from tests.helpers.edges import refused
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import pretrain, reported, tiny_config, write_tiny_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_sets(tmp_path_factory.mktemp("data"))


FILES = ("longer", "b", "c")
ENDS = {name: STARTS[name] + np.cumsum(LENGTHS[name]) for name in FILES}


def document(token: int) -> tuple[str, int]:
    """The data set and the document of a token."""
    name = next(name for name in reversed(FILES) if token >= STARTS[name])
    return name, int(np.searchsorted(ENDS[name], token, side="right"))


def expected(now: Data, earlier: list[tuple[Data, int]]) -> order.Tally:
    """The counts, from every sample of all runs."""
    read: Counter[int] = Counter()
    start = 0
    for number, (data, stop) in enumerate(earlier):
        read += data.tokens(start, stop, data.ledger(*earlier[:number]).now)
        start = stop
    span, samples, assumed = now.ledger(*earlier).now, now.samples(), Counter[int]()
    for source, place in enumerate(span.places):  # each as if it had been read by itself
        samples.draw(Drawing((1.0,), (Place(place.number),)), [source], [None])
        assumed += Counter(t for i in range(place.drawn) for t in real(samples[i]))
    samples = now.samples()
    epoch = [set(real(part[i])) for part in samples.parts for i in range(len(part))]
    comes = set().union(*epoch)
    again = {t: read[t] - assumed[t] for t in read if read[t] > assumed[t] and t in comes}
    skipped = assumed - read
    return order.Tally(
        sum(again.values()),
        len({document(t) for t in again}),
        sum(bool(window & again.keys()) for window in epoch),
        sum(skipped.values()),
        len({document(t) for t in skipped}),
    )


KINDS: dict[str, dict[str, Any]] = {
    "a longer sequence": {"seq_length": 32},
    "a shorter sequence": {"seq_length": 8},
    "a sequence that shares no window": {"seq_length": 23},
    "another seed": {"seed": 8},
    "a seed beyond 32 bits": {"seed": 7 + 2**32},
    "another split": {"split": "60,40,0"},
    "documents appended and a seed": {"path": ("longer",), "seed": 3},
    "packed documents": {"packing": "best_fit"},
    "packed documents appended, and a seed": {"packing": "best_fit", "path": ("longer",), "seed": 3},
}
BLENDS: dict[str, dict[str, Any]] = {
    "a longer sequence": {"path": ("0.7", "a", "0.3", "b"), "seq_length": 40},
    "a seed and one more": {"path": ("0.6", "a", "0.2", "b", "0.2", "c"), "seed": 4},
}


@pytest.mark.parametrize("read", [40, 250], ids=["in the first epoch", "in the third"])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_all_samples(kind: str, read: int, folder: Path) -> None:
    before = Data(folder)
    now = replace(before, **KINDS[kind])
    change = now.change((before, read))
    assert change is not None and change.tally == expected(now, [(before, read)])
    assert change.tally.tokens_again or change.tally.tokens_skipped
    line, samples, length = change.line(), now.samples(), len(before.samples())
    assert "\n" not in line and ("again" in line or "skipped" in line)
    tokens = min(len(samples) * now.seq_length, read % length * before.seq_length)
    place = -(-tokens // now.seq_length)
    assert f"sample {place % len(samples):,} of {len(samples):,} of epoch {read // length + 1}" in line


@pytest.mark.parametrize("kind", BLENDS)
def test_counts_of_blends(kind: str, folder: Path) -> None:
    before = Data(folder, path=("0.7", "a", "0.3", "b"))
    now = replace(before, **BLENDS[kind])
    change = now.change((before, 150))
    assert change is not None and change.tally == expected(now, [(before, 150)])


def test_a_chain_of_changes_counts_from_the_beginning(folder: Path) -> None:
    one, two, three = Data(folder), Data(folder, seq_length=32), Data(folder, seed=2)
    change = three.change((one, 30), (two, 70))
    assert change is not None and change.tally == expected(three, [(one, 30), (two, 70)])
    back = one.change((one, 30), (two, 70))
    assert back is not None and back.tally == expected(one, [(one, 30), (two, 70)])
    packed = replace(two, packing="best_fit")
    change = replace(packed, seed=2).change((packed, 30), (one, 70))
    assert change is not None and change.tally == expected(replace(packed, seed=2), [(packed, 30), (one, 70)])
    assert "data.packing concat -> best_fit" in change.line()


@pytest.mark.parametrize(
    "change",
    [{}, {"batch": 16}, {"path": ("moved",)}, {"split": "8,2"}, {"path": ("3", "moved")}],
    ids=["nothing", "batch size", "the files moved", "a split in other units", "a blend of one"],
)
def test_what_changes_no_order_is_not_said(change: dict[str, Any], folder: Path) -> None:
    before = Data(folder)
    assert replace(before, **change).change((before, 40)) is None


def test_a_large_data_set_is_estimated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, now = Data(folder, path=("longer",)), Data(folder, path=("longer",), seed=9)
    exact = expected(now, [(before, 60)])
    monkeypatch.setattr(order, "EXACT_PIECES", 200)
    change = now.change((before, 60))
    assert change is not None and change.tally is not None and not change.tally.exact
    assert change.tally.tokens_again == pytest.approx(exact.tokens_again, rel=0.4)
    assert change.tally.documents_skipped == pytest.approx(exact.documents_skipped, rel=0.4)
    assert "about" in change.line() and change.tally.windows_again is None


def trained_documents(data: Data, read: int, name: str) -> set[int]:
    return {number for which, number in map(document, data.tokens(0, read)) if which == name}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"split": "90,10,0"}, "longer"),
        ({"split": "60,40,0"}, "longer"),
        ({"split": "50,0,50"}, "longer"),
        ({"path": ("longer",)}, "longer"),
        ({"path": ("0.5", "b", "0.5", "longer")}, "longer"),
        ({"seq_length": 32}, "longer"),
        ({"path": ("b",)}, "b"),
    ],
)
def test_documents_that_change_sides_are_counted(change: dict[str, Any], name: str, folder: Path) -> None:
    before, read = Data(folder), 40
    now = replace(before, **change)
    held = set(range(*split_bounds(90, (0.8, 0.2, 0.0))[1]))
    shares = now.config().data.split_shares()
    number = now.order().files[-1].documents
    sides = [set(range(*bound)) for bound in split_bounds(number, shares)]
    found = now.change((before, read))
    assert found is not None
    if name != "longer":
        assert not found.leaks
        return
    assert found.held_out_trained == len(held & sides[0])
    assert found.trained_held_out == len(trained_documents(before, read, name) & (sides[1] | sides[2]))
    assert found.leaks == ("seq_length" not in change)


# Whole runs.


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("walks"))


@pytest.fixture(scope="module")
def begun(walks: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has stopped after 4 steps of 8 samples."""
    run_dir = tmp_path_factory.mktemp("begun") / "run"
    run_on_ranks(1, pretrain, tiny_config(run_dir, walks, train={"exit_interval": 4}))
    return run_dir


def copy_of(begun: Path, folder: Path) -> Path:
    return Path(shutil.copytree(begun, folder / "run"))


Sections = dict[str, dict[str, Any]]


def test_a_run_says_it_and_its_checkpoints_remember(begun: Path, walks: str, tmp_path: Path) -> None:
    run_dir, changed = copy_of(begun, tmp_path), {"model": {"seq_length": 32}}

    def go_on(stop: int, sections: Sections) -> None:
        run_on_ranks(1, pretrain, tiny_config(run_dir, walks, **{**sections, "train": {"exit_interval": stop}}))

    go_on(5, changed)
    [said] = reported(run_dir, "data")
    assert "model.seq_length 16 -> 32" in said["line"] and said["tokens_again"] + said["tokens_skipped"] > 0
    go_on(6, changed)
    assert len(reported(run_dir, "data")) == 1, "the second start has changed nothing"
    [first, second] = read_json(run_dir / "checkpoints/global_step6/sgt_state.json")["data"]
    assert (first["from_sample"], first["seq_length"]) == (0, 16)
    assert (second["from_sample"], second["seq_length"]) == (32, 32)
    assert second["places"] == [{"number": 0, "drawn": 16}], "as many tokens of the epoch"


def refused_by_a_dry_run(config: Config, folder: Path, *said: str) -> None:
    file = folder / "run.yaml"
    file.write_text(config.to_yaml())
    before = snapshot(folder)
    refused(run_script("pretrain_sgt.py", ["--config", str(file), "--dry-run"], folder), 4, *said)
    assert snapshot(folder) == before


@pytest.mark.parametrize("split", ["100,0,0", "80,20,0"])
def test_a_leak_is_refused_and_allowed(split: str, begun: Path, walks: str, tmp_path: Path) -> None:
    run_dir = copy_of(begun, tmp_path)
    data = {"data_path": [walks], "data_cache_path": f"{walks}_cache", "split": split}
    sections: Sections = {"data": data, "train": {"exit_interval": 5, "eval_interval": 0}}
    what = "held out .* trained on now: 12 documents" if split == "100,0,0" else r"trained on so far.*: \d+ document"
    refused_by_a_dry_run(tiny_config(run_dir, walks, **sections), tmp_path, what, "data.allow_validation_leak: true")
    with pytest.raises(CheckpointError, match="allow_validation_leak"):
        run_on_ranks(2, pretrain, tiny_config(run_dir, walks, **sections))
    data["allow_validation_leak"] = True
    run_on_ranks(1, pretrain, tiny_config(run_dir, walks, **sections))
    [said] = reported(run_dir, "data")
    assert said["held_out_trained"] == (12 if split == "100,0,0" else 0)
    assert (said["trained_held_out"] > 0) == (split != "100,0,0")


def forget(state: dict[str, Any]) -> None:
    """What a checkpoint of an earlier version holds."""
    del state["data"]


def test_a_checkpoint_without_a_record(begun: Path, walks: str, tmp_path: Path) -> None:
    def change(config: Config, edit: Callable[[dict[str, Any]], None]) -> str | None:
        start = find_start(config)
        edit(start.saved)
        found = data_start(config, start).change
        return None if found is None else found.line()

    same, longer = (tiny_config(begun, walks, model={"seq_length": n}) for n in (16, 32))
    assert change(same, forget) is None
    told, old = change(longer, dict), change(longer, forget)
    assert told is not None and old == f"{told}; the checkpoint does not say what its files held: taken as they are now"


def no_begins(old: object, new: object) -> bool:
    return False


def test_what_came_before_the_first_record_is_not_counted(folder: Path) -> None:
    """The files of a checkpoint without a record had moved; records begin where the run went on."""
    before, now = Data(folder), Data(folder, seq_length=8)
    known, cut = (
        find_change(Ledger((Span(first, before.order()),)).until(9), Span(9, now.order()), no_begins, now.indices)
        for first in (0, 4)
    )
    assert known is not None and known.tally is not None and known.unknown == ()
    assert cut is not None and cut.tally is None and cut.unknown == ("what was read before sample 4 is not recorded",)
    assert "read before and to come again" not in cut.line() and "not recorded" in cut.line()


def test_a_registered_data_set_is_not_guessed_at(folder: Path) -> None:
    before = Data(folder).order()
    registered = replace(before, dataset="mine", files=())
    longer = replace(registered, seq_length=32)
    reads, indices = Ledger((Span(0, registered),)).until(9), Data(folder).indices
    change = find_change(reads, Span(9, longer), no_begins, indices)
    assert change is not None and "model.seq_length 16 -> 32: " in change.line() and "is not known" in change.line()
    assert find_change(reads, Span(9, registered), no_begins, indices) is None
