"""The first failure is claimed by one rank, in the store or in a file, reported once, and followed by the others."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch.distributed as dist

from megatron_sgt.guard import exit_protocol
from megatron_sgt.guard.exit_protocol import ExitProtocol
from megatron_sgt.guard.report import Failure
from megatron_sgt.guard.store_channel import StoreChannel, StoreGoneError

LOST = Failure("lost", 3, "n1", "step 7 (train)", "killed", 1)
MISTAKE = Failure("mistake", 2, "n1", "step 7 (data)", "a file is gone", 3)
HANG = Failure("hang", 1, "n1", "step 7 (train)", "no progress", 1)


class Left(Exception):
    """Stands for the end of the process."""


def record(folder: Path, rank: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "collectives").write_text(f"of rank {rank}")
    return "recorded"


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ExitProtocol]:
    """Ranks 0 and 1 of 4 with one store; leaving raises Left(code), nobody sleeps."""

    def leave(self: ExitProtocol, code: int) -> NoReturn:
        raise Left(code)

    monkeypatch.setattr(ExitProtocol, "leave", leave)
    monkeypatch.setattr(exit_protocol.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(exit_protocol.flight_recorder, "write", record)
    store = dist.HashStore()
    return [ExitProtocol(rank, 4, tmp_path / "failures", StoreChannel(store)) for rank in (0, 1)]


@pytest.mark.parametrize(("store", "later"), [(True, True), (False, False), (True, False)])
def test_one_reports_and_the_others_follow(
    store: bool, later: bool, ranks: list[ExitProtocol], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that finds no store any more: rank 0 has left with it."""
    one, other = ranks
    one.store_gone = not store
    assert one.known_failure() is None
    with pytest.raises(Left, match="1"):
        one.fail(LOST, "start again")
    other.store_gone = not later
    assert other.known_failure() == LOST
    with pytest.raises(Left, match="1"):
        other.fail(Failure("lost", 2, "n1", "step 7 (train)", "killed"), "start again")
    errors = capsys.readouterr().err
    assert errors.splitlines()[0] == "LOST  rank 3 of 4 on n1, in step 7 (train)" and errors.count("LOST") == 1
    assert (one.folder / "report.txt").read_text() == errors
    assert [path.name for path in one.folder.glob("first.*")] == ["first.json"]


@pytest.mark.parametrize("store", [True, False])
def test_two_ranks_that_find_the_same_report_it_once(
    store: bool, ranks: list[ExitProtocol], capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ranks:
        rank.store_gone = not store
        with pytest.raises(Left):
            rank.fail(LOST, "start again")
    assert capsys.readouterr().err.count("LOST") == 1


def test_a_mistake_is_followed_silently_with_its_code(
    ranks: list[ExitProtocol], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ranks[0].claim(MISTAKE) == MISTAKE
    with pytest.raises(Left, match="3"):
        ranks[1].fail(LOST, "start again")
    assert capsys.readouterr().err == "" and not ranks[1].folder.exists()


def test_a_hang_leaves_every_ranks_stacks(ranks: list[ExitProtocol]) -> None:
    with pytest.raises(Left):
        ranks[1].follow(HANG)
    text = (ranks[1].folder / "rank_00001.stacks.txt").read_text()
    assert (ranks[1].folder / "collectives").read_text() == "of rank 1"
    assert text.startswith("rank 1 hangs, in step 7 (train)\n")
    assert "test_a_hang_leaves_every_ranks_stacks" in text


def test_a_store_that_is_gone_is_asked_once(ranks: list[ExitProtocol], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def bounded(question: Any, seconds: float) -> NoReturn:
        asked.append(seconds)
        raise StoreGoneError("silence")

    monkeypatch.setattr(exit_protocol, "bounded", bounded)
    assert ranks[0].claim(LOST) == LOST
    assert ranks[0].known_failure() == LOST and len(asked) == 1


def test_where_nothing_can_be_written_it_is_printed_all_the_same(
    tmp_path: Path, ranks: list[ExitProtocol], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failures").write_text("a file")
    ranks[0].store_gone = True
    with pytest.raises(Left):
        ranks[0].fail(LOST, "start again")
    errors = capsys.readouterr().err
    assert "LOST  rank 3" in errors and "cannot write" in errors


def test_only_one_thread_ends_the_process(ranks: list[ExitProtocol]) -> None:
    assert not ranks[0].is_taken
    ranks[0].take()
    ranks[0].take()  # the same thread may go on
    assert ranks[0].is_taken and not ranks[0]._taken.acquire(blocking=False)


def test_who_reports_a_hang_records_too(ranks: list[ExitProtocol], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Left):
        ranks[0].fail(HANG, "start again")
    errors = capsys.readouterr().err
    assert errors.index("HANG  rank 1") < errors.index("[rank 0] recorded"), "reported first, whatever the record does"
    with pytest.raises(Left):
        ranks[1].follow(LOST)
    assert (ranks[0].folder / "collectives").read_text() == "of rank 0", "only of a hang"


def test_a_record_that_never_comes_or_fails_holds_up_nobody(
    ranks: list[ExitProtocol], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(folder: Path, rank: int) -> str:
        raise RuntimeError("no driver")

    never = threading.Event()
    monkeypatch.setattr(exit_protocol, "RECORD_SECONDS", 0.2)
    for write in (lambda folder, rank: never.wait(60), fails):
        monkeypatch.setattr(exit_protocol.flight_recorder, "write", write)
        begun = time.monotonic()
        ranks[0].dump_collectives()
        assert time.monotonic() - begun < 10
    never.set()
    errors = capsys.readouterr().err
    assert "no record of its collectives: no answer in 0.2 s" in errors
    assert "no record of its collectives: no driver" in errors


def test_a_record_that_keeps_the_interpreter_ends_the_process(
    ranks: list[ExitProtocol], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call into a driver that never returns and holds Python's lock: no Python thread can end the process."""
    sleep = ctypes.PyDLL(None).sleep  # called with the lock held
    monkeypatch.setattr(exit_protocol, "RECORD_SECONDS", 0.3)
    monkeypatch.setattr(exit_protocol.flight_recorder, "write", lambda folder, rank: sleep(60))
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        ranks[0].dump_collectives()
        os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1 and time.monotonic() - begun < 30
