"""The first failure is claimed by one rank, in the store or in a file, told once, and followed by the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch.distributed as dist

from megatron_sgt.engine.watch import way_out
from megatron_sgt.engine.watch.post import Post, StoreGoneError
from megatron_sgt.engine.watch.report import Failure
from megatron_sgt.engine.watch.way_out import WayOut

LOST = Failure("lost", 3, "n1", "step 7 (train)", "killed", 1)
MISTAKE = Failure("mistake", 2, "n1", "step 7 (data)", "a file is gone", 3)
HANG = Failure("hang", 1, "n1", "step 7 (train)", "no progress", 1)


class Left(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[WayOut]:
    """Ranks 0 and 1 of 4 with one store; leaving raises Left(code), nobody sleeps."""

    def leave(self: WayOut, code: int) -> NoReturn:
        raise Left(code)

    monkeypatch.setattr(WayOut, "leave", leave)
    monkeypatch.setattr(way_out.time, "sleep", lambda seconds: None)
    store = dist.HashStore()
    return [WayOut(rank, 4, tmp_path / "failures", Post(store)) for rank in (0, 1)]


@pytest.mark.parametrize("store", [True, False])
def test_one_tells_and_the_others_follow(
    store: bool, ranks: list[WayOut], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = ranks
    one.store_gone = other.store_gone = not store
    assert one.known_failure() is None
    with pytest.raises(Left, match="1"):
        one.fail(LOST, "start again")
    assert other.known_failure() == LOST
    with pytest.raises(Left, match="1"):
        other.fail(Failure("lost", 2, "n1", "step 7 (train)", "killed"), "start again")
    errors = capsys.readouterr().err
    assert (
        errors.splitlines()[0] == "LOST  rank 3 of 4 on n1, in step 7 (train)" and errors.count("LOST") == 1
    )
    assert (one.folder / "report.txt").read_text() == errors
    assert [path.name for path in one.folder.glob("first.*")] == ([] if store else ["first.json"])


def test_a_mistake_is_followed_silently_with_its_code(
    ranks: list[WayOut], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ranks[0].claim(MISTAKE) == MISTAKE
    with pytest.raises(Left, match="3"):
        ranks[1].fail(LOST, "start again")
    assert capsys.readouterr().err == "" and not ranks[1].folder.exists()


def test_a_hang_leaves_every_ranks_stacks(ranks: list[WayOut]) -> None:
    with pytest.raises(Left):
        ranks[1].follow(HANG)
    text = (ranks[1].folder / "rank_00001.stacks.txt").read_text()
    assert text.startswith("rank 1 hangs, in step 7 (train)\n")
    assert "test_a_hang_leaves_every_ranks_stacks" in text


def test_a_store_that_is_gone_is_asked_once(ranks: list[WayOut], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def bounded(question: Any, seconds: float) -> NoReturn:
        asked.append(seconds)
        raise StoreGoneError("silence")

    monkeypatch.setattr(way_out, "bounded", bounded)
    assert ranks[0].claim(LOST) == LOST
    assert ranks[0].known_failure() == LOST and len(asked) == 1


def test_where_nothing_can_be_written_it_is_told_all_the_same(
    tmp_path: Path, ranks: list[WayOut], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failures").write_text("a file")
    ranks[0].store_gone = True
    with pytest.raises(Left):
        ranks[0].fail(LOST, "start again")
    errors = capsys.readouterr().err
    assert "LOST  rank 3" in errors and "cannot write" in errors


def test_only_one_thread_ends_the_process(ranks: list[WayOut]) -> None:
    assert not ranks[0].is_taken
    ranks[0].take()
    ranks[0].take()  # the same thread may go on
    assert ranks[0].is_taken and not ranks[0]._taken.acquire(blocking=False)
