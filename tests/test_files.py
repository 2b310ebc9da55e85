"""Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from megatron_sgt import files


class Killed(BaseException):
    """As a process dies."""


def test_text_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    files.replace_text(path, "old")

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(Killed):
        files.replace_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["latest"]


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    with pytest.raises(ValueError), files.replacing(path) as temporary:
        temporary.write_text("a line")
        raise ValueError
    assert os.listdir(tmp_path) == []
    with files.replacing(path) as temporary:
        temporary.write_bytes(b"a line\n")
        assert os.listdir(tmp_path) == ["corpus.jsonl.tmp"]
    assert path.read_bytes() == b"a line\n" and os.listdir(tmp_path) == ["corpus.jsonl"]


def test_content_name_and_folder_reach_the_disk_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is on disk before its content would be an empty file after a crash."""
    seen: list[str] = []
    replace = os.replace

    def renamed(source: Path, target: Path) -> None:
        seen.append(f"{source.name} -> {target.name}")
        replace(source, target)

    monkeypatch.setattr(files, "sync", lambda path: seen.append(path.name))
    monkeypatch.setattr(files.os, "replace", renamed)
    files.replace_text(tmp_path / "latest", "x")
    assert seen == ["latest.tmp", "latest.tmp -> latest", tmp_path.name]


def test_a_folder_takes_no_other_ones_place(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError):
        files.commit(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old/file").read_text() == "old"
    files.commit(tmp_path / "new", tmp_path / "third")
    assert (tmp_path / "third/file").read_text() == "new" and not (tmp_path / "new").exists()


def test_a_fresh_folder_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    files.fresh_folder(tmp_path / "a")
    assert os.listdir(tmp_path / "a") == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        files.fresh_folder(tmp_path / "file" / "below")


def test_a_checksum_of_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK", 3)
    (tmp_path / "x").write_bytes(b"0123456789")
    assert files.sha256_of(tmp_path / "x") == hashlib.sha256(b"0123456789").hexdigest()


def test_a_place_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert files.nearest(tmp_path / "a/b") == tmp_path
    assert files.nearest(tmp_path / "file") == tmp_path / "file"
    assert files.unwritable(tmp_path) is None and files.unwritable(tmp_path / "new" / "deep") is None
    assert files.unwritable(tmp_path / "file" / "x") == f"{tmp_path / 'file'} is a file"
    monkeypatch.setattr("os.access", lambda *_: False)
    assert files.unwritable(tmp_path) == f"{tmp_path} is not writable"
    assert os.listdir(tmp_path) == ["file"]


def test_a_sample_is_of_the_size_the_ends_and_pieces_between(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 10**6
    path.write_bytes(bytes(size))
    whole = files.sample_of(path)
    for place, seen in (
        (0, True),
        (1 << 15, True),
        (100_000, False),
        (262_144, True),
        (size - 200_000, True),
        (size - 1, True),
    ):
        path.write_bytes(bytes(place) + b"x" + bytes(size - place - 1))
        assert (files.sample_of(path) != whole) == seen, place
    path.write_bytes(bytes(size + 1))
    assert files.sample_of(path) != whole
    path.write_bytes(b"a" * 1000)
    small = files.sample_of(path)
    path.write_bytes(b"a" * 500 + b"b" + b"a" * 499)
    assert files.sample_of(path) != small, "a small file is read whole"
