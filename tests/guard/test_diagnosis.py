"""Whom a failing run names: from beats, words and process states of four ranks on two hosts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_sgt.guard import diagnosis
from megatron_sgt.guard.beat import Beat
from megatron_sgt.guard.diagnosis import Diagnosis
from megatron_sgt.guard.exit_protocol import ExitProtocol
from megatron_sgt.guard.store_channel import StoreChannel
from megatron_sgt.lease import process
from megatron_sgt.lease.process import Identity

BEAT = Beat(5, "train", 7, 40, True, 0, 0.1)
RANKS = [Identity(host, host, 100 + n, 1) for n, host in enumerate(("a", "a", "b", "b"))]


class Scene:
    """Rank 0 asks; ``alive`` ranks send a new beat while it waits."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive = [0, 1, 2, 3]
        self.behind: int | None = None
        self.states = dict.fromkeys(range(4), "S")
        self.killed: list[tuple[int, int]] = []
        self.channel = StoreChannel(dist.HashStore())
        self.call = Diagnosis(ExitProtocol(0, 4, folder, self.channel), RANKS, keeper=True)
        self.beat([0, 1, 2, 3], BEAT)
        monkeypatch.setattr(diagnosis.time, "sleep", self._wait)
        monkeypatch.setattr(process, "process_state", lambda identity: self.states[identity.pid - 100])
        monkeypatch.setattr(diagnosis.os, "kill", lambda pid, number: self.killed.append((pid, number)))

    def beat(self, ranks: list[int], beat: Beat) -> None:
        for rank in ranks:
            self.channel.put(f"beat/{rank}", beat.text())

    def say(self, **words: str) -> None:
        for rank, text in words.items():
            self.channel.put(f"hang/{rank.removeprefix('rank')}", text)

    def _wait(self, seconds: float) -> None:
        self.beat(self.alive, dataclasses.replace(BEAT, number=8))
        if self.behind is not None:
            self.beat([self.behind], dataclasses.replace(BEAT, number=8, count=38))


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def stopped(scene: Scene) -> None:
    scene.states[1], scene.alive = "T", [0, 2, 3]


def silent(scene: Scene) -> None:
    scene.alive = [0, 1, 2]


def busy(scene: Scene) -> None:
    waiting = "waiting in all_reduce, called from train_step (step.py:7)"
    scene.say(rank0=waiting, rank1=waiting, rank2="at sleep (x.py:1)", rank3=waiting)


@pytest.mark.parametrize(
    ("what", "rank", "said"),
    [
        (stopped, 1, "rank 1 on a, step 7 (train): stopped by a signal"),
        (silent, 3, "rank 3 on b, step 7 (train): silent"),
        (busy, 2, "rank 2 on b, step 7 (train): at sleep (x.py:1)"),
    ],
)
def test_whom_a_hang_names(what: Callable[[Scene], None], rank: int, said: str, scene: Scene) -> None:
    what(scene)
    failure, details = scene.call.hang("no progress for 30 s", "step 7 (train)")
    assert (failure.rank, failure.host) == (rank, RANKS[rank].host)
    assert failure.cause == f"no progress for 30 s; behind: rank {rank}"
    assert details[0].startswith(said), details
    assert len(details) == 4
    assert [pid for pid, _ in scene.killed] == ([101] if what is stopped else []), "asked for its stacks"


@pytest.mark.parametrize("queued", [False, True])
def test_who_keeps_others_at_the_store_is_named(queued: bool, scene: Scene) -> None:
    waiting = "waiting at the store, called from build_datasets (gpt_dataset.py:105)"
    scene.say(rank0="at build_index (index_cache.py:90)", rank1=waiting, rank2=waiting, rank3=waiting)
    call = dataclasses.replace(scene.call, queued=queued)
    assert call.hang("no progress", "opening the data")[0].rank == 0


@pytest.mark.parametrize("queued", [False, True])
def test_a_rank_that_is_marks_behind(queued: bool, scene: Scene) -> None:
    scene.behind = 2
    failure, _ = dataclasses.replace(scene.call, queued=queued).hang("no progress", "step 7 (train)")
    assert failure.rank == 2 and failure.cause.endswith("behind: rank 2")


WAITING = "waiting in recv_forward, called from pipelined_step (pipeline.py:7)"


def pipelined(scene: Scene, counts: tuple[int, ...], queued: bool = False) -> Diagnosis:
    """Two pipeline stages of two ranks, at different micro-batches."""
    for rank, count in enumerate(counts):
        scene.beat([rank], dataclasses.replace(BEAT, number=8, count=count))
    scene.alive = []
    return dataclasses.replace(scene.call, num_stages=2, queued=queued)


@pytest.mark.parametrize("hanging", [0, 1, 2, 3])
def test_a_neighbour_stage_that_waits_is_not_named(hanging: int, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later stage lags behind its own peer, whether the rank that hangs has begun fewer micro-batches or not."""
    monkeypatch.setattr(Diagnosis, "silent", lambda self: [])
    scene.say(**{f"rank{rank}": "at sleep (x.py:1)" if rank == hanging else WAITING for rank in range(4)})
    late = hanging % 2
    call = pipelined(scene, tuple(40 - (rank == 2 + late) for rank in range(4)))
    failure, _ = call.hang("no progress", "step 7 (train)")
    assert (failure.rank, failure.cause) == (hanging, f"no progress; behind: rank {hanging}")


def test_who_hangs_among_stages_is_left_open_where_hosts_do_not_show_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs every host is at the same line; the ranks of the two columns are told apart by their marks."""
    monkeypatch.setattr(Diagnosis, "silent", lambda self: [])
    scene.say(rank0=READING, rank1=READING, rank2=READING, rank3=READING)
    failure, details = pipelined(scene, (43, 44, 40, 41), queued=True).hang("no progress", "step 7 (train)")
    assert failure.rank is None and "behind: rank 0, 2, on several pipeline stages" in failure.cause
    assert [line.split(" on ")[0] for line in details] == ["rank 0", "rank 2", "rank 1", "rank 3"]
    failure, _ = pipelined(scene, (44, 44, 40, 41), queued=True).hang("no progress", "step 7 (train)")
    assert failure.rank == 2, "its peer on the stage has overtaken it, and nobody else lags"


def test_a_rank_in_an_earlier_step_is_named_whatever_its_stage(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Diagnosis, "silent", lambda self: [])
    call = pipelined(scene, (44, 44, 41, 41))
    scene.beat([1], dataclasses.replace(BEAT, phase="checkpoint", step=6, count=45))
    failure, _ = call.hang("no progress", "step 7 (train)")
    assert (failure.rank, failure.place) == (1, "step 6 (checkpoint)")


def test_all_wait(scene: Scene) -> None:
    waiting = "waiting in all_reduce"
    scene.say(rank0=waiting, rank1=waiting, rank2=waiting, rank3=waiting)
    failure, _ = scene.call.hang("no progress", "step 7 (train)")
    assert failure.rank is None and failure.host == "", "nobody is to blame"
    assert failure.cause.endswith("behind: none, all ranks are at the same mark and wait for each other")


READING = "at train_step (step.py:70)"
IN_GATHER = "waiting in all_gather_object, called from _compare (straggler.py:150)"


@pytest.mark.parametrize(
    ("queued", "last"),
    [(True, READING), (True, IN_GATHER), (False, READING)],
    ids=["gpu", "gpu, mixed", "cpu"],
)
def test_hosts_that_read_a_device_are_not_to_blame(queued: bool, last: str, scene: Scene) -> None:
    """The device is what waits: on GPUs every host stops where it next reads its device, also the missing rank's."""
    scene.say(rank0=READING, rank1=READING, rank2=READING, rank3=last)
    call = dataclasses.replace(scene.call, queued=queued)
    failure, details = call.hang("no progress", "step 7 (train)")
    assert failure.rank is None and failure.place == "step 7 (train)", failure
    assert len(details) == 4 and not scene.killed


def test_without_the_store_its_keeper_is_silent(scene: Scene) -> None:
    scene.call.exit.store_gone = True
    assert scene.call.silent() == []
    other = Diagnosis(ExitProtocol(1, 4, scene.call.exit.folder, None), RANKS, keeper=True)
    assert other.silent() == [0] and other.beats() == {}
    assert dataclasses.replace(other, keeper=False).silent() == [], "torchrun's agent keeps the store"
    assert other.is_reporter("here"), "each reports, and the file decides"


def test_one_rank_is_the_reporter(scene: Scene) -> None:
    other = Diagnosis(ExitProtocol(1, 4, scene.call.exit.folder, scene.channel), RANKS, keeper=True)
    assert scene.call.is_reporter("here") and not other.is_reporter("there")


def test_a_loss(scene: Scene) -> None:
    failure, details = scene.call.loss([2, 3], BEAT)
    assert (failure.kind, failure.rank, failure.host) == ("lost", 2, "b")
    assert failure.place == "step 7 (train)" and "node b is lost" in failure.cause
    assert details == ["also gone: rank 3 on b"]
    ahead = dataclasses.replace(BEAT, step=9, phase="checkpoint")
    assert scene.call.loss([2], ahead)[0].place == "step 9 (checkpoint)", "its last word is two steps old"
    scene.beat([3], dataclasses.replace(BEAT, oom_kills=1))
    assert "OOM killer" in scene.call.loss([2], BEAT)[0].cause
    assert "SIGKILL" in scene.call.loss([1], BEAT)[0].cause
