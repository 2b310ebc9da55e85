"""One writer per folder: second ones are refused, dead ones are followed, two who come at once are told apart."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_sgt.errors import ExitCode, LeaseError
from megatron_sgt.lease import Hold, beside, held, holder_of, inside, lease_file, release_all
from megatron_sgt.lease.process import own_identity, process_state
from tests.helpers.leases import TIMEOUT, asked, elsewhere, held_by_another, identity_of, lease_of, write

_context = multiprocessing.get_context("fork")


def refusal(folder: Path, said: list[str] | None = None) -> str:
    with pytest.raises(LeaseError) as caught:
        lease_of(folder, said).take()
    assert caught.value.exit_code == ExitCode.CHECKPOINT and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_lease_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    lease = lease_of(folder)
    lease.take()
    path = inside(folder)
    lease.check()
    before = path.read_bytes()
    time.sleep(3 * TIMEOUT / 12)
    assert path.read_bytes() != before and len(path.read_bytes()) == len(before), "no sign of life"
    assert os.listdir(folder) == [path.name]
    holder = holder_of(path)
    assert holder is not None and holder.process == own_identity()
    lease.release()
    lease.release()
    assert list(tmp_path.iterdir()) == [], "what it has made and left empty goes with it"
    assert holder_of(path) is None
    with pytest.raises(LeaseError, match="no longer held"):
        lease.check()


def test_a_second_process_is_refused_and_changes_nothing_the_first_goes_on(tmp_path: Path) -> None:
    with held_by_another(inside(tmp_path)) as first:
        before = os.stat(tmp_path).st_mtime_ns
        said = refusal(tmp_path)
        assert os.stat(tmp_path).st_mtime_ns == before, "something was made in the folder"
        for part in (f"pid {first.pid}", os.uname().nodename, r"since \d{4}-", r"last sign of life \d+ s ago"):
            assert re.search(part, said), said
        assert "choose another folder" in said and f"kill {first.pid}" in said
        assert asked(first) == "ok"


def test_a_killed_holder_is_followed_at_once_and_without_a_word(tmp_path: Path) -> None:
    with held_by_another(inside(tmp_path), timeout=600) as first:
        first.kill()
        first.wait()
    said: list[str] = []
    begun = time.monotonic()
    with held(lease_of(tmp_path, said, timeout=600)):
        assert time.monotonic() - begun < 1 and said == []


def test_a_stopped_holder_is_followed_when_it_is_stale_and_ends_when_it_goes_on(tmp_path: Path) -> None:
    with held_by_another(inside(tmp_path)) as first:
        first.send_signal(signal.SIGSTOP)
        while process_state(identity_of(first.pid)) != "T":
            time.sleep(0.01)
        assert "stopped by a signal" in refusal(tmp_path), "fresh: it may be continued at once"
        time.sleep(TIMEOUT)
        said: list[str] = []
        lease = lease_of(tmp_path, said)
        lease.take()
        assert len(said) == 1 and f"pid {first.pid}" in said[0] and "stopped" in said[0]
        first.send_signal(signal.SIGCONT)
        answer = asked(first)
        assert f"pid {os.getpid()}" in answer and "taken for dead" in answer
        time.sleep(3 * TIMEOUT / 12)  # its signs of life reach nobody
        lease.check()
        assert first.stdin is not None
        first.stdin.close()
        first.wait()
        lease.check()  # its end has not taken the new one's lease away
        lease.release()


def test_a_stopped_holder_ends_too_when_its_successor_has_ended_before(tmp_path: Path) -> None:
    with held_by_another(inside(tmp_path), timeout=0.5) as first:
        first.send_signal(signal.SIGSTOP)
        time.sleep(0.8)
        with held(lease_of(tmp_path, timeout=0.5)):
            pass
        first.send_signal(signal.SIGCONT)
        assert "was held by another" in asked(first)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_clocks_that_differ_decide_nothing(skew: float, tmp_path: Path) -> None:
    """Another host's lease whose times are an hour off: refused if it changes, followed if it does not."""
    path = write(tmp_path, elsewhere(), age=skew)
    said: list[str] = []
    with _beating(path, skew):
        text = refusal(tmp_path, said)
    assert "node7 (pid 4711)" in text and len(said) == 1 and "watched" in said[0]
    begun = time.monotonic()
    with held(lease_of(tmp_path, said)):
        assert time.monotonic() - begun >= TIMEOUT / 4 and "no sign of life" in said[-1]


@contextmanager
def _beating(path: Path, skew: float) -> Iterator[None]:
    process = _context.Process(target=_beat, args=(path, skew))
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _beat(path: Path, skew: float) -> None:
    descriptor = os.open(path, os.O_RDWR)
    for number in range(2, 1000):
        lease_file.rewrite(descriptor, elsewhere().encoded(number))
        os.utime(path, (time.time() - skew,) * 2)
        time.sleep(0.1)


@pytest.mark.parametrize("content", [b"", b"{}"], ids=["empty", "edited"])
def test_a_lease_that_cannot_be_read(content: bytes, tmp_path: Path) -> None:
    inside(tmp_path).write_bytes(content)
    said: list[str] = []
    lease = lease_of(tmp_path, said, timeout=0.4)
    lease.take()
    assert "unknown writer" in said[0] and "taken over" in said[1]
    inside(tmp_path).write_bytes(content)  # over the file of a living holder: still its own
    lease.check()
    lease.release()
    assert os.listdir(tmp_path) == [], "given back"


@pytest.mark.parametrize(("dead", "rounds"), [("ended", 60), ("silent", 4)])
def test_of_many_who_find_a_dead_lease_exactly_one_gets_it(dead: str, rounds: int, tmp_path: Path) -> None:
    gone = elsewhere() if dead == "silent" else elsewhere(process=dataclasses.replace(own_identity(), pid=2**22 + 1))
    for number in range(rounds):
        (tmp_path / str(number)).mkdir()
        write(tmp_path / str(number), gone, age=100.0)
    barrier, winners = _context.Barrier(3), _context.Array("i", rounds)

    def work() -> None:
        for number in range(rounds):
            lease = lease_of(tmp_path / str(number), timeout=0.4)
            barrier.wait()
            try:
                lease.take()
            except LeaseError:
                barrier.wait()
                continue
            barrier.wait()
            lease.check()
            with winners.get_lock():
                winners[number] += 1

    processes = [_context.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert list(winners) == [1] * rounds
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_fork_gives_nothing_back(tmp_path: Path) -> None:
    with held(lease_of(tmp_path)) as lease:
        process = _context.Process(target=lease.release)
        process.start()
        process.join()
        lease.check()
        assert inside(tmp_path).exists()


def _rename(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def _empty(folder: Path) -> None:
    inside(folder).unlink()


def _replace(folder: Path) -> None:
    _rename(folder)
    folder.mkdir()


@pytest.mark.parametrize("how", [_rename, _empty, _replace], ids=["moved", "emptied", "replaced"])
def test_a_folder_that_went_is_made_again_and_its_old_place_is_free(
    how: Callable[[Path], None], tmp_path: Path
) -> None:
    folder, said = tmp_path / "run", list[str]()
    with held(lease_of(folder, said)) as lease:
        how(folder)
        lease.check()
        lease.check()
        assert len(said) == 1 and str(folder) in said[0] and lease.remade is not None
        assert holder_of(inside(folder)) is not None
        if (moved := tmp_path / "moved").exists():
            with held(lease_of(moved)):
                pass


def test_a_folder_that_went_and_is_held_by_another(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(lease_of(folder)) as lease:
        _rename(folder)
        with held_by_another(inside(folder)) as other, pytest.raises(LeaseError, match=rf"pid {other.pid}"):
            lease.check()


def test_a_folder_that_cannot_be_made_again_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(lease_of(folder)) as lease:
        _rename(folder)
        folder.write_text("a file")
        lease.check()
        folder.unlink()
        lease.check()
        assert inside(folder).exists()


def test_a_file_system_that_does_not_answer_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with held(lease_of(tmp_path)) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(lease_file, "read", silent)
            patch.setattr(lease_file, "rewrite", silent)
            time.sleep(0.3)
            lease.check()
        lease.check()


def test_folders_that_stand_and_fall_together(tmp_path: Path) -> None:
    one, two, link = tmp_path / "one", tmp_path / "two", tmp_path / "link"
    one.mkdir()
    link.symlink_to(one)
    hold = Hold()
    hold.take(lease_of(one), lease_of(link), lease_of(one / "below"))
    assert len(hold.leases) == 2, "the same folder under two names"
    hold.check()
    hold.release()
    with held_by_another(inside(two)) as other, pytest.raises(LeaseError, match=f"pid {other.pid}"):
        Hold().take(lease_of(one), lease_of(two))
    assert not inside(one).exists()


def test_an_exit_gives_everything_back(tmp_path: Path) -> None:
    lease_of(tmp_path / "a").take()
    lease_of(tmp_path / "b").take()
    release_all()
    assert list(tmp_path.iterdir()) == []


def test_what_is_made_as_a_whole_has_its_lease_beside(tmp_path: Path) -> None:
    assert beside(tmp_path / "out") == tmp_path / "out.writer.json"
