"""The file of a lease: made at once or not at all, taken away only if it is the one that was judged."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from megatron_sgt.lease import lease_file
from tests.helpers.leases import elsewhere, write

ROUNDS = 200


def create(path: Path) -> bool:
    descriptor = lease_file.create(path, elsewhere().encoded(1))
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


def test_it_is_made_once_with_the_mode_of_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "writer.json"
    assert create(path) and not create(path)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_it_is_made_once_with_the_mode_of_the_umask(tmp_path)


def test_an_answer_that_was_lost_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NFS client that asks again is told that the name exists: it is the one that it has made."""
    link = os.link

    def twice(*names: Path) -> None:
        link(*names)
        link(*names)

    monkeypatch.setattr(os, "link", twice)
    assert create(tmp_path / "writer.json")


def test_a_lease_that_came_meanwhile_is_not_taken_away(tmp_path: Path) -> None:
    path = write(tmp_path, elsewhere())
    seen = lease_file.read(path)
    assert seen is not None
    write(tmp_path, elsewhere(token="new"))
    assert not lease_file.take_away(path, lambda now: now.content == seen.content)
    looks = iter([True, False])  # it came between the look and the rename: it is put back
    assert not lease_file.take_away(path, lambda now: next(looks))
    assert os.listdir(tmp_path) == [path.name]
    assert lease_file.take_away(path, lambda now: True) and lease_file.take_away(path, lambda now: False)


def test_the_age_is_of_one_clock_and_leftovers_go(tmp_path: Path) -> None:
    path = write(tmp_path, elsewhere(), age=50)
    seen = lease_file.read(path)
    assert seen is not None and lease_file.age(path, seen) == pytest.approx(50, abs=2)
    (tmp_path / "writer.json.0123.tmp").touch()
    lease_file.clear(path)
    assert os.listdir(tmp_path) == [path.name]


def test_of_many_who_make_one_at_once_exactly_one_has(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, made = context.Barrier(3), context.Array("i", ROUNDS)

    def work() -> None:
        for number in range(ROUNDS):
            barrier.wait()
            if create(tmp_path / str(number)):
                with made.get_lock():
                    made[number] += 1

    processes = [context.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert list(made) == [1] * ROUNDS
