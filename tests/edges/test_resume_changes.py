"""A run that goes on under changed settings or over changed files says what it reads again and what it skips, and does
not train on what was held out. The counts are compared with lists of the tokens of every sample."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sgt.checkpoint.layout import read_json
from megatron_sgt.config import Config
from megatron_sgt.data import order
from megatron_sgt.data.changes import Change, find_change
from megatron_sgt.data.gpt_dataset import BlendedSamples, build_datasets
from megatron_sgt.data.history import DataOrder, Span, from_json, order_of, to_json
from megatron_sgt.data.index_cache import build_index_cache
from megatron_sgt.data.splits import split_bounds
from megatron_sgt.errors import CheckpointError
from tests.helpers.commands import run_script, snapshot
from tests.helpers.datasets import write_dataset
from tests.helpers.edges import refused
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import pretrain, reported, tiny_config, write_tiny_data

VOCABULARY = 65_000
"""More than all tokens of the data sets here, so that every token tells its place."""


def lengths(number: int, seed: int) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(1, 70, number)]


LENGTHS = {"a": lengths(90, 1), "b": lengths(60, 2), "longer": [*lengths(90, 1), *lengths(40, 3)], "c": lengths(80, 4)}
STARTS = {"a": 0, "longer": 0, "b": 20_000, "c": 40_000}
"""The first token of each data set: ``longer`` is ``a`` with documents appended."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data")
    for name, each in LENGTHS.items():
        write_dataset(made / name, each, STARTS[name], VOCABULARY)
    for suffix in (".bin", ".idx"):
        shutil.copy(made / f"a{suffix}", made / f"moved{suffix}")
    return made


def real(sample: dict[str, Any]) -> list[int]:
    """The tokens of a sample without its padding."""
    return sample["tokens"].tolist()[: sample.get("num_tokens")]


@dataclass
class Data:
    """Settings of a run over the data sets of a folder."""

    folder: Path
    path: tuple[str, ...] = ("a",)
    seq_length: int = 16
    seed: int = 7
    split: str = "80,20,0"
    batch: int = 8
    packing: str = "concat"

    def config(self) -> Config:
        paths = [part if part[0].isdigit() else str(self.folder / part) for part in self.path]
        return tiny_config(
            self.folder / "run",
            "",
            model={"seq_length": self.seq_length, "vocab_size": VOCABULARY},
            train={"seed": self.seed, "train_iters": self.batch, "global_batch_size": self.batch},
            data={
                "data_path": paths,
                "split": self.split,
                "data_cache_path": str(self.folder / "cache"),
                "packing": self.packing,
                "reset_attention_mask": self.packing == "best_fit",
            },
        )

    def order(self) -> DataOrder:
        return order_of(self.config())

    def samples(self) -> BlendedSamples:
        return build_datasets(self.config(), None)[0]

    def tokens(self, start: int, stop: int) -> Counter[int]:
        """How often each token is read by the samples number start .. stop - 1."""
        samples = self.samples()
        return Counter(t for i in range(start, stop) for t in real(samples[i]))

    def change(self, *earlier: tuple[Data, int]) -> Change | None:
        """What this one makes of runs that have read up to sample n each, one after the other."""
        spans, start = [], 0
        for data, stop in earlier:
            spans.append(Span(data.order(), start, stop))
            start = stop
        return find_change(spans, self.order(), self.indices)

    def indices(self, *wanted: Any) -> str:
        *about, packing = wanted
        return build_index_cache(*about, str(self.folder / "cache"), packing)


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
    for data, stop in earlier:
        read += data.tokens(start, stop)
        start = stop
    assumed = now.tokens(0, start)
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
    "a data set more": {"path": ("0.6", "a", "0.4", "b")},
    "another data set": {"path": ("b",)},
    "documents appended": {"path": ("longer",)},
    "documents appended and a seed": {"path": ("longer",), "seed": 3},
    "packed documents": {"packing": "best_fit"},
    "packed documents appended": {"packing": "best_fit", "path": ("longer",)},
    "one data set twice": {"path": ("0.6", "a", "0.4", "moved")},
}
BLENDS: dict[str, dict[str, Any]] = {
    "another weight": {"path": ("0.5", "a", "0.5", "b")},
    "another order of the blend": {"path": ("0.3", "b", "0.7", "a")},
    "one less": {"path": ("a",)},
    "one exchanged": {"path": ("0.7", "a", "0.3", "c")},
    "a longer sequence": {"path": ("0.7", "a", "0.3", "b"), "seq_length": 40},
}


@pytest.mark.parametrize("read", [40, 250], ids=["in the first epoch", "in the third"])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_all_samples(kind: str, read: int, folder: Path) -> None:
    before = Data(folder)
    now = replace(before, **KINDS[kind])
    change = now.change((before, read))
    assert change is not None and change.tally == expected(now, [(before, read)])
    assert change.tally.tokens_again or change.tally.tokens_skipped
    line = change.line()
    assert "\n" not in line and ("again" in line or "skipped" in line)
    if change.sample is not None:
        length = len(now.samples())
        assert f"sample {read % length:,} of {length:,} of epoch {read // length + 1}" in line


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


def test_other_data_under_the_same_name_is_said(folder: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", LENGTHS["a"], STARTS["a"], VOCABULARY)
    before = Data(tmp_path)
    spans = [Span(before.order(), 0, 40)]
    for suffix in (".bin", ".idx"):
        shutil.copy(folder / f"c{suffix}", tmp_path / f"a{suffix}")
    change = find_change(spans, before.order(), before.indices)
    assert (
        change is not None
        and re.search(r"not the 90 \([\d,]+\) of then", change.line())
        and "is not known" in change.line()
    )
    same_lengths = np.fromfile(folder / "a.bin", np.uint16)
    shutil.copy(folder / "a.idx", tmp_path / "a.idx")
    same_lengths[::-1].tofile(tmp_path / "a.bin")
    change = find_change(spans, before.order(), before.indices)
    assert change is not None and "is other data than before" in change.line()


def test_the_record_survives_json(folder: Path) -> None:
    one = Data(folder).order()
    two = Data(folder, seq_length=32, path=("0.4", "a", "0.6", "b"), packing="best_fit").order()
    record = json.loads(json.dumps(to_json([Span(one, 0, 30)], two, 30)))
    assert "packing" not in record[0], "as before there was a choice"
    spans = from_json(record, 50)
    assert spans == (Span(one, 0, 30), Span(two, 30, 50))
    assert json.loads(json.dumps(to_json(spans, two, 50))) == record, "the same order is no new entry"
    assert to_json((), one, 50)[0]["from_sample"] == 50, "of what was read before, nothing is known"
    assert json.loads(json.dumps(to_json(spans, one, 20))) == record[:1], (
        "a run that goes back to before a change forgets it"
    )


@pytest.mark.parametrize("record", [[{}], [3], "x", [{"from_sample": 9, "files": 4}], None])
def test_a_damaged_record_is_refused(record: Any) -> None:
    with pytest.raises(CheckpointError, match="record of the data is damaged"):
        from_json(record, 4)


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
    from megatron_sgt.engine.data_start import data_start
    from megatron_sgt.preflight import find_start

    def change(config: Config, edit: Callable[[dict[str, Any]], None]) -> str | None:
        start = find_start(config)
        edit(start.saved)
        found = data_start(config, start).change
        return None if found is None else found.line()

    same, longer = (tiny_config(begun, walks, model={"seq_length": n}) for n in (16, 32))
    assert change(same, forget) is None
    told, old = change(longer, dict), change(longer, forget)
    assert told is not None and old == f"{told}; the checkpoint does not say what its files held: taken as they are now"


def test_what_came_before_the_first_record_is_not_counted(folder: Path) -> None:
    """The files of a checkpoint without a record had moved; records begin where the run went on."""
    before, now = Data(folder), Data(folder, seq_length=8)
    known, cut = (find_change([Span(before.order(), first, 9)], now.order(), now.indices) for first in (0, 4))
    assert known is not None and known.tally is not None and known.unknown == ()
    assert cut is not None and cut.tally is None and cut.unknown == ("what was read before sample 4 is not recorded",)
    assert "read before and to come again" not in cut.line() and "not recorded" in cut.line()


def test_a_registered_data_set_is_not_guessed_at(folder: Path) -> None:
    before = Data(folder).order()
    registered = replace(before, dataset="mine", files=())
    longer = replace(registered, seq_length=32)
    change = find_change([Span(registered, 0, 9)], longer, Data(folder).indices)
    assert change is not None and "model.seq_length 16 -> 32: " in change.line() and "is not known" in change.line()
    assert find_change([Span(registered, 0, 9)], registered, Data(folder).indices) is None
