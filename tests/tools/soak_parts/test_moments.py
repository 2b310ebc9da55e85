"""Each moment is met where a save passes it, in its order, by the thread that writes."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from pathlib import Path

import pytest
from soak_parts.moments import MOMENTS, arm, disarm, held, watch

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.manifest import commit_folder
from megatron_sgt.files import sync

ARMED = multiprocessing.Array("i", 2, lock=False)


@pytest.fixture(scope="module", autouse=True)
def watched() -> None:
    """A hook cannot be taken away: one for all tests, which sees nothing while nothing is armed."""
    watch(0, ARMED)


def save(root: Path) -> None:
    """What a save of step 8 does to the files, and the deletion of step 4 after it."""
    folder = root / "global_step8.tmp"
    folder.mkdir()
    for number in range(3):
        (folder / f"rng_rank_{number:05d}.pt").write_bytes(b"1234")
        sync(folder / f"rng_rank_{number:05d}.pt")
    commit_folder(folder, root / "global_step8", {"step": 8})
    layout.point_to(root, "global_step8")
    layout.prune(root, keep_last=1)


@pytest.mark.parametrize(
    ("name", "there", "missing"),
    [
        ("killed between the files of a save", "global_step8.tmp", "global_step8.tmp/manifest.json"),
        ("killed before the manifest", "global_step8.tmp/rng_rank_00002.pt", "global_step8.tmp/manifest.json"),
        ("killed after the manifest", "global_step8.tmp/manifest.json", "global_step8"),
        ("killed before latest is written", "global_step8/manifest.json", "latest"),
        ("killed in the deletion of an old checkpoint", "global_step4.removed.tmp", "global_step4"),
    ],
)
def test_a_thread_is_held_at_its_moment(name: str, there: str, missing: str, tmp_path: Path) -> None:
    (tmp_path / "global_step4.tmp").mkdir()
    commit_folder(tmp_path / "global_step4.tmp", tmp_path / "global_step4", {"step": 4})
    assert arm(ARMED, 0, name, random.Random(3)) == 0
    if name.endswith("checkpoint"):
        ARMED[1] = 0  # one file alone is deleted here
    saving = threading.Thread(target=save, args=(tmp_path,))
    saving.start()
    deadline = time.monotonic() + 10
    while not held(ARMED, 0) and saving.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    seen = held(ARMED, 0), (tmp_path / there).exists(), (tmp_path / missing).exists()
    disarm(ARMED)
    saving.join(10)
    assert seen == (True, True, False)
    assert not saving.is_alive() and layout.finished_tags(tmp_path) == ["global_step8"]


def test_every_moment_is_tested() -> None:
    (mark,) = [mark for mark in test_a_thread_is_held_at_its_moment.pytestmark if mark.name == "parametrize"]
    assert {case[0] for case in mark.args[1]} == set(MOMENTS)


def test_moments_of_the_commit_are_those_of_rank_0() -> None:
    armed = [0] * 4
    assert arm(armed, 1, "killed before the manifest", random.Random(1)) == 0
    assert arm(armed, 1, "killed between the files of a save", random.Random(1)) == 1
    assert armed[0] > 0 and armed[2] > 0 and not held(armed, 1)
