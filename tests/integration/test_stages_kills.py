"""A run that grows twice is killed around its boundaries, started again, and is in the end the run that never was.

A rank kills itself at a named moment: between two files of a save (the moments of the soak tool), or as a function of
the boundary is entered or left. The other ranks are killed when it is dead.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import pytest
from soak_parts.moments import MOMENTS, paths_of

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.surgery.reader import GrownReader
from megatron_sgt.config import Config
from megatron_sgt.engine import loop, stage
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.preflight import find_start
from tests.helpers.exhaustive import share_of
from tests.helpers.ranks import run_on_ranks, running_on_ranks
from tests.helpers.runs import differing_leaves, measured_steps, reported, write_tiny_data
from tests.helpers.staged import DECIDES, END, INSIDE, grow_records, looping_config, pretrain_counting

TIMEOUT_S = 60.0
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "tp2_zero1_async": {
        "parallel": {"tensor_model_parallel_size": 2, "zero_stage": 1, "device": "cpu"},
        "deepspeed": {"zero_optimization": {"stage": 1}},
        "checkpoint": {"save_interval": 3, "keep_last": 2, "async_save": True},
    },
    "dp2_zero3": {
        "parallel": {"zero_stage": 3, "device": "cpu"},
        "checkpoint": {"save_interval": 3, "keep_last": 2, "async_save": False},
    },
}


class Strike(NamedTuple):
    """The moment at which a rank kills itself.

    ``what``: "save": a file of step ``step``'s save, "step": a training step, or a function; ``when``: the moment of
    the save, or before or after the function; ``count``: at which call of it.
    """

    what: str
    when: str
    count: int = 1
    step: int = 0
    rank: int = 0


FUNCTIONS: dict[str, tuple[Any, str]] = {
    "step": (loop, "train_step"),
    "release": (stage, "release_engine"),
    "build": (deepspeed, "initialize"),
    "read": (GrownReader, "whole"),
}


def arm(strike: Strike, rank: int, marker: Path) -> None:
    """Kill this process at the moment of ``strike``, if it is this rank's; ``marker`` tells of it."""
    if rank != strike.rank:
        return
    told = os.open(marker, os.O_WRONLY | os.O_CREAT)
    passed = [0]

    def count() -> None:
        passed[0] += 1
        if passed[0] == strike.count:
            os.write(told, b"struck")
            os.kill(os.getpid(), signal.SIGKILL)

    if strike.what == "save":
        matches = MOMENTS[strike.when].matches

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename") and matches(event, paths := paths_of(event, args)):
                ours = [path for path in paths if f"/global_step{strike.step}." in path]
                if ours or (paths[-1].endswith("/latest") and _newest(Path(paths[-1]).parent) == strike.step):
                    count()

        sys.addaudithook(hook)
        return
    place, name = FUNCTIONS[strike.what]
    setattr(place, name, partial_method(getattr(place, name), strike.when, count))


def partial_method(function: Callable[..., Any], when: str, act: Callable[[], None]) -> Callable[..., Any]:
    """``function``, with ``act`` before or after it."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            act()
        result = function(*args, **kwargs)
        if when == "after":
            act()
        return result

    return wrapped


def _newest(root: Path) -> int:
    """The newest checkpoint that has its name."""
    names = [name for name in os.listdir(root) if name.startswith("global_step") and "." not in name]
    return max((layout.step_of(name) for name in names), default=0)


def train_until_struck(info: RankInfo, config: Config, strike: Strike, marker: Path) -> None:
    arm(strike, info.rank, marker)
    pretrain_counting(info, config)


SAVE = {
    "files": "killed between the files of a save",
    "manifest": "killed before the manifest",
    "rename": "killed after the manifest",
    "latest": "killed before latest is written",
}
ONE, TWO = "tp2_zero1_async", "dp2_zero3"
CASES: dict[str, tuple[str, dict[Strike, tuple[int, ...]]]] = {
    "before the boundary save": (ONE, {Strike("step", "after", INSIDE): (0, 3)}),
    "between the files of the boundary save": (ONE, {Strike("save", SAVE["files"], 2, INSIDE, rank=1): (3,)}),
    "before the manifest of the boundary save": (TWO, {Strike("save", SAVE["manifest"], 1, INSIDE): (3,)}),
    "before the boundary save has its name": (ONE, {Strike("save", SAVE["rename"], 1, INSIDE): (3,)}),
    "before latest names the boundary save": (TWO, {Strike("save", SAVE["latest"], 1, INSIDE): (3,)}),
    "before the old engine is released": (ONE, {Strike("release", "before"): (INSIDE,)}),
    "as the old engine is released": (TWO, {Strike("release", "after", rank=1): (INSIDE,)}),
    "before the new engine is built": (TWO, {Strike("build", "before", 2): (INSIDE,)}),
    "as the new engine is built": (ONE, {Strike("build", "after", 2, rank=1): (INSIDE,)}),
    "as it begins to read": (ONE, {Strike("read", "before", 1): (INSIDE,)}),
    "in the middle of reading": (TWO, {Strike("read", "before", 20, rank=1): (INSIDE,)}),
    "before the next stage's first step": (TWO, {Strike("step", "before", INSIDE + 1): (INSIDE,)}),
    "before the next stage's first save": (ONE, {Strike("step", "after", INSIDE + 2, rank=1): (INSIDE,)}),
    "inside the next stage's first save": (TWO, {Strike("save", SAVE["files"], 1, 6, rank=1): (INSIDE,)}),
    "after the next stage's first save": (TWO, {Strike("step", "before", INSIDE + 3): (6,)}),
    "in the second boundary save": (TWO, {Strike("save", SAVE["manifest"], 1, DECIDES): (6,)}),
    "as the second stage is released": (ONE, {Strike("release", "after", 2): (DECIDES,)}),
    "reading at the second boundary": (TWO, {Strike("read", "before", 200): (DECIDES,)}),
    "twice in a row at the first boundary": (
        ONE,
        {
            Strike("read", "before", 3): (INSIDE,),
            Strike("read", "before", 5, rank=1): (INSIDE,),
            Strike("step", "before", 1): (INSIDE,),
        },
    ),
    "at both boundaries, twice each": (
        TWO,
        {
            Strike("save", SAVE["rename"], 1, INSIDE): (3,),
            Strike("build", "after", 2): (INSIDE,),
            Strike("save", SAVE["latest"], 1, DECIDES): (6,),
            Strike("read", "before", 1): (DECIDES,),
        },
    ),
}
"""Layout; per attempt the strike, and at which of these steps the next attempt begins."""
SHARE = ["twice in a row at the first boundary"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@cache
def data(folder: Path) -> str:
    return write_tiny_data(folder)


@cache
def undisturbed(folder: Path, name: str) -> Path:
    """The directory of the run that is never killed."""
    run_dir = folder / name
    run_on_ranks(2, pretrain_counting, looping_config(run_dir, data(folder), **LAYOUTS[name]))
    return run_dir


def kill(config: Config, strike: Strike, marker: Path) -> None:
    """Start, wait for the strike, kill what is left."""
    marker.unlink(missing_ok=True)
    with running_on_ranks(2, train_until_struck, config, strike, marker):
        deadline = time.monotonic() + TIMEOUT_S
        while not (marker.exists() and marker.read_bytes()):
            assert time.monotonic() < deadline, f"{strike} did not come"
            time.sleep(0.005)
        time.sleep(random.Random(str(strike)).uniform(0, 0.1))


@pytest.mark.parametrize("case", share_of(CASES, SHARE))
def test_a_run_that_is_killed_is_the_one_that_is_not(case: str, folder: Path, tmp_path: Path) -> None:
    name, strikes = CASES[case]
    config = looping_config(tmp_path / "run", data(folder), **LAYOUTS[name])
    for strike, possible in strikes.items():
        kill(config, strike, tmp_path / "marker")
        begins = find_start(config).folder
        assert (0 if begins is None else layout.step_of(begins.name)) in possible, strike
        if begins is not None:
            manifest.verify_checksums(begins)
    run_on_ranks(2, pretrain_counting, config)
    whole, parts = undisturbed(folder, name), tmp_path / "run"
    expected, found = measured_steps(whole), measured_steps(parts)
    assert [step["step"] for step in found] == list(range(1, END + 1)), "each step once"
    assert [step["consumed_samples"] for step in found] == [8 * step for step in range(1, END + 1)]
    assert found == expected
    assert reported(parts, "growth") == reported(whole, "growth")
    assert grow_records(parts) == grow_records(whole)
    tag = f"checkpoints/global_step{END}"
    assert differing_leaves(whole / tag, parts / tag) == []
    states = [layout.read_json(where / tag / layout.STATE_FILE) for where in (whole, parts)]
    assert states[0] == states[1]
    assert not list(config.save_dir.glob("*.tmp"))
