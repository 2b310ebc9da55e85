"""Blends that change while a run goes on: every source goes on where it was; other data under its name is refused."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sgt.checkpoint.layout import read_json
from megatron_sgt.config import Config
from megatron_sgt.data import order
from megatron_sgt.data.changes import find_change
from megatron_sgt.data.ledger import Ledger, Place, Span
from megatron_sgt.engine.data_start import data_start
from megatron_sgt.engine.hooks.spike import LossSpike
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.errors import DataError
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.preflight import Start
from tests.helpers.changing_data import LENGTHS, STARTS, VOCABULARY, Data, every_begins, real, write_data_sets
from tests.helpers.datasets import write_dataset
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import measured_steps, pretrain, reported, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_sets(tmp_path_factory.mktemp("data"))


CONTINUED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a data set more": (
        {"path": ("0.5", "a", "0.3", "b", "0.2", "c")},
        ("b go on where they last stopped", "/c begins"),
    ),
    "another weight": ({"path": ("0.5", "a", "0.5", "b")}, ("a, ", "b go on where they last stopped")),
    "another order of the blend": ({"path": ("0.3", "b", "0.7", "a")}, ("a go on where they last stopped",)),
    "one less": ({"path": ("a",)}, ("goes on at sample 35 of 157 of epoch 1", "/b is not read on")),
    "one exchanged": ({"path": ("0.7", "a", "0.3", "c")}, ("/a goes on where", "/c begins", "/b is not read on")),
    "another data set": ({"path": ("c",)}, ("/c begins", "are not read on")),
    "documents appended": (
        {"path": ("0.7", "longer", "0.3", "b"), "split": "100,0,0"},
        ("the 40 documents appended come with its next epoch, after the",),
    ),
    "packed documents appended": (
        {"path": ("0.7", "longer", "0.3", "b"), "split": "100,0,0", "packing": "best_fit"},
        ("the 40 documents appended come with its next epoch, after the",),
    ),
    "one twice": ({"path": ("0.4", "a", "0.3", "b", "0.3", "moved")}, ("/moved begins",)),
}


@pytest.mark.parametrize("kind", CONTINUED)
def test_sources_of_another_blend_go_on_where_they_were(kind: str, folder: Path) -> None:
    """Until the blend has come to the end of its epoch, no token of a source is read again."""
    changed, said = CONTINUED[kind]
    before = Data(folder, path=("0.7", "a", "0.3", "b"), split=changed.get("split", "80,20,0"))
    before.packing = changed.get("packing", "concat")
    now = replace(before, **changed)
    change, span = now.change((before, 50)), now.ledger((before, 50)).now
    assert change is not None and change.tally == order.Tally()
    assert all(words in change.line() for words in said), change.line()
    assert "nothing is read again or skipped" in change.line()
    again = now.samples().names.index(str(folder / "moved")) if "moved" in now.path else None
    read, samples = set(before.tokens(0, 50)), now.samples(span)
    for index in range(50, 90):
        part = samples.locate(index)[0]
        if part != again:
            tokens = set(real(samples[index]))
            assert not tokens & read, f"sample {index} of {samples.names[part]}"
            read |= tokens


def test_a_source_that_went_back_in_an_earlier_version_is_not_said_to_be_left(folder: Path) -> None:
    one, two, now = (Data(folder, path=(weight, "a", "0.5", "b")) for weight in ("2", "0.1", "0.5"))
    before, begins = Ledger((Span(0, one.order()), Span(40, two.order()))), every_begins(folder)
    change = find_change(before.until(50), before.turned(now.order(), 50, begins).now, begins, now.indices)
    assert change is not None and "b go on where they last stopped" in change.line()
    assert "not read on" not in change.line()


def test_other_data_under_the_same_name_is_said(folder: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", LENGTHS["a"], STARTS["a"], VOCABULARY)
    before = Data(tmp_path)
    ledger, config = Ledger((Span(0, before.order()),)), before.config()
    start = Start(tmp_path, {"trainer": {"step": 5, "consumed_samples": 40}, "data": ledger.to_json()})
    for suffix in (".bin", ".idx"):
        shutil.copy(folder / f"c{suffix}", tmp_path / f"a{suffix}")
    with pytest.raises(DataError, match=r"a is other data than checkpoint .* then 90 .*data.allow_changed_data: true"):
        data_start(config, start)
    allowed = config.model_copy(update={"data": config.data.model_copy(update={"allow_changed_data": True})})
    found = data_start(allowed, start)
    assert found.change is not None and found.ledger.now.places == (Place(1),)
    assert re.search(r"not the 90 \([\d,]+\) of then", found.change.line())
    assert "is not known" in found.change.line() and "/a begins" in found.change.line()
    same_lengths = np.fromfile(folder / "a.bin", np.uint16)
    shutil.copy(folder / "a.idx", tmp_path / "a.idx")
    same_lengths[::-1].tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match="is other data than checkpoint"):
        data_start(config, start)


# Whole runs.

TURN = 3
"""The step after which the second blend is read."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets over the vocabulary of ``tiny_config``."""
    made = tmp_path_factory.mktemp("small")
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        write_dataset(made / name, [int(n) for n in np.random.default_rng(seed).integers(20, 60, 80)], seed, 64)
    return made


def blend_config(run_dir: Path, small: Path, path: tuple[str, ...], stop: int, workers: int = 0) -> Config:
    paths = [part if part[0].isdigit() else str(small / part) for part in path]
    data = {"data_path": paths, "data_cache_path": str(small / "cache"), "num_workers": workers}
    sections = {"data": data, "train": {"exit_interval": stop}, "checkpoint": {"save_interval": 2}}
    return tiny_config(run_dir, "", **sections)


FIRST, SECOND = ("0.7", "a", "0.3", "b"), ("0.5", "c", "0.5", "a")


def turning_run(info: RankInfo, config: Config, second: tuple[str, ...]) -> None:
    """Turn to ``second`` after step TURN, as a run with phases does; once go back to before, as after a loss spike."""
    first = config.data.data_path
    Config.data_paths = property(lambda self: (first, second))  # type: ignore[assignment,method-assign]
    Config.data_path_at = lambda self, step: second if step >= TURN else first  # type: ignore[method-assign]
    run = PretrainingRun(config, info)
    for back in (True, False):
        run.stage.train(run._batches(), TURN, between=True)
        run.turn_blend(first)
        assert len(run.ledger.spans) == 1, "the present blend is no turn"
        run.turn_blend(second)
        assert [span.start for span in run.ledger.spans] == [0, 24]
        if back:
            run._go_back(LossSpike(TURN, 9.0, 1.0, 16))
            assert (run.state.step, run.state.consumed_samples) == (2, 16)
            assert [span.start for span in run.ledger.spans] == [0], "the turn is undone"
    run.stage.train(run._batches(), run.last_step, between=False)
    run.hub.close()
    run.folders.release()


def test_a_run_turns_to_another_blend_and_back(small: Path, tmp_path: Path) -> None:
    second = tuple(part if part[0].isdigit() else str(small / part) for part in SECOND)
    one, other = tmp_path / "one", tmp_path / "other"
    run_on_ranks(2, turning_run, blend_config(one, small, FIRST, 5, workers=1), second)
    run_on_ranks(2, pretrain, blend_config(other, small, FIRST, TURN))
    run_on_ranks(2, pretrain, blend_config(other, small, SECOND, 5))
    assert measured_steps(one) == measured_steps(other), "as a run that is resumed with the other blend"
    kept, again = (read_json(run / "checkpoints/global_step4/sgt_state.json")["data"] for run in (one, other))
    assert kept == again and "places" not in kept[0] and (kept[1]["from_sample"], kept[1]["origin"]) == (24, 24)
    assert kept[1]["places"] == [{"number": 2, "drawn": 0}, {"number": 0, "drawn": 17}]
    [said] = reported(other, "data")
    assert "/a goes on where it last stopped" in said["line"] and "/c begins" in said["line"]
    assert said["tokens_again"] == said["tokens_skipped"] == 0
