from collections.abc import Callable
from typing import Any

import pytest

from megatron_sgt.errors import CheckpointError, ConfigError, DataError
from megatron_sgt.guard import ending
from megatron_sgt.launch.rank_info import LOOPBACK, RankInfo


def rank(number: int, local: int | None = None, of: int = 4) -> RankInfo:
    return RankInfo(number, of, number if local is None else local, min(of, 2), LOOPBACK, 1, "torchrun")


def fail(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds slept instead of sleeping; no process group; alone unless `place` is patched again."""
    seconds: list[float] = []
    monkeypatch.setattr(ending.time, "sleep", seconds.append)
    monkeypatch.setattr(ending, "_store", lambda: None)
    monkeypatch.setattr(ending, "place", lambda: rank(0, of=1))
    return seconds


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (7, 7)])
def test_done(result: int | None, code: int) -> None:
    assert ending.run_rank(lambda: result) == code


@pytest.mark.parametrize(("error", "code"), [(ConfigError, 2), (DataError, 3), (CheckpointError, 4)])
def test_a_mistake(error: type[Exception], code: int, waited: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert ending.run_rank(fail(error("wrong; do this"))) == code
    assert capsys.readouterr().err == "error: wrong; do this\n"
    assert sum(waited) == 0


def test_a_bug_and_an_interrupt(waited: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert ending.run_rank(fail(ZeroDivisionError("x"))) == 1
    assert "Traceback" in capsys.readouterr().err
    assert ending.run_rank(fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.startswith("interrupted") and sum(waited) == 0


def test_rank_0_reports_first_and_others_if_they_are_still_there() -> None:
    """A launcher ends the others when rank 0 leaves; what only one rank has met must be reported all the same."""
    seconds = [ending.patience(info) for info in (rank(0), rank(1), rank(2, local=0, of=4), rank(3, local=1, of=4))]
    assert seconds[0] == 0 and seconds == sorted(set(seconds))


def test_another_rank_waits_and_names_itself(
    waited: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ending, "place", lambda: rank(1))
    assert ending.run_rank(fail(DataError("missing here"))) == 3
    assert capsys.readouterr().err.startswith("error: missing here (rank 1 on ")
    assert waited == [ending.patience(rank(1))]


@pytest.mark.parametrize(("answer", "prints"), [(1, True), (2, False), (RuntimeError("gone"), False)])
def test_with_a_store_the_first_reports(
    answer: Any,
    prints: bool,
    waited: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The others wait before they leave, so that the first is not killed in the middle of its sentence."""

    class Store:
        def add(self, key: str, amount: int) -> int:
            if isinstance(answer, Exception):
                raise answer
            return answer

    left: list[int] = []
    monkeypatch.setattr(ending, "_store", Store)
    monkeypatch.setattr(ending, "place", lambda: rank(1))
    monkeypatch.setattr(ending.os, "_exit", left.append)
    ending.run_rank(fail(DataError("wrong")))
    assert ("wrong" in capsys.readouterr().err) == prints
    assert left == [3] and (sum(waited) == 0) == prints
