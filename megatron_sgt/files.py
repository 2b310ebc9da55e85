"""Files and folders that are whole and on disk, or not there at all: written aside, synced, then renamed. No torch.

A reader sees the old content or the new one, never a part of it, also after a crash of the machine.

Raises:
    OSError: from every function, for what cannot be read or written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".tmp"
_CHUNK = 1 << 22
_NAMES = "surrogateescape"  # in a text, the name of a file that is no UTF-8 has the bytes that it has on the disk
_SAMPLED_HEAD, _SAMPLED_END, _SAMPLED_PIECE, _SAMPLED_PIECES = 1 << 16, 1 << 18, 1 << 12, 7


def temporary_of(path: Path) -> Path:
    """Where ``path`` is written before it gets its name: beside it, so that a rename is enough."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def sync(path: Path) -> None:
    """Return when a file's content, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(temporary: Path, final: Path) -> None:
    """Give the file or folder ``temporary`` the name ``final``, in one atomic step.

    A file takes the place of an older one, a folder only of an empty one. Content that was written into files of a
    folder must be on disk already (``sync_all``).
    """
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def sync_all(folder: Path) -> None:
    """Return when the content of every file below ``folder`` is on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


@contextmanager
def replacing(path: Path, mark: str = "") -> Iterator[Path]:
    """A file to write in the block, which takes the place of ``path`` at its end; after an error nothing is left.

    mark: tells its temporary name from that of another writer, where there may be one.
    """
    temporary = temporary_of(path.with_name(f"{path.name}{mark}"))
    try:
        yield temporary
        commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str, mark: str = "") -> None:
    """Give ``path`` the content ``text`` (UTF-8) in one atomic step. ``mark``: see ``replacing``."""
    with replacing(path, mark) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=_NAMES)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) durably: the file is on disk when this returns."""
    path.write_text(text, encoding="utf-8", errors=_NAMES)
    sync(path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` durably, for people to read too."""
    write_text(path, json.dumps(value, indent=2) + "\n")


class Appender:
    """A file that is only appended to, whose folder is made: each piece is in it wholly or, on a full disk, not at all.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def append(self, piece: bytes) -> None:
        """Append ``piece``; it is with the system when this returns.

        Raises:
            OSError: it cannot be written.
        """
        start = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(piece) != len(piece):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            with contextlib.suppress(OSError):  # what was wrong is said by the first error
                self._file.truncate(start)
            raise

    def is_there(self) -> bool:
        """Whether the path still leads to the open file: it may have been deleted or moved away."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False
        except (OSError, ValueError):  # a file system that does not answer; a file that could not be made again
            return not self._file.closed

    def close(self) -> None:
        self._file.close()


def fresh_folder(folder: Path) -> None:
    """Make an empty ``folder``, over whatever an interrupted attempt has left there."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def sha256_of(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)  # lets other threads run meanwhile
    return digest.hexdigest()


def sample_of(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file's size, beginning, end, and seven short pieces evenly between them.

    Reads at most 0.4 MB. Of a file of ``torch.save`` the end holds the CRC-32 of every tensor, so that other weights of
    the same shapes give another sample; a bit that has flipped on the disk may not.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        if size <= 2 * _SAMPLED_END:
            digest.update(stream.read())
            return digest.hexdigest()
        middle = range(_SAMPLED_END, size - _SAMPLED_END, max(1, (size - 2 * _SAMPLED_END) // _SAMPLED_PIECES))
        for start, length in [
            (0, _SAMPLED_HEAD),
            *((start, _SAMPLED_PIECE) for start in middle),
            (size - _SAMPLED_END, _SAMPLED_END),
        ]:
            stream.seek(start)
            digest.update(stream.read(length))
    return digest.hexdigest()


def nearest(path: Path) -> Path:
    """``path``, or the nearest place above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def unwritable(folder: Path) -> str | None:
    """Why ``folder`` can be neither made nor written to; None if it can."""
    place = nearest(folder)
    if not place.is_dir():
        return f"{place} is a file"
    return None if os.access(place, os.W_OK | os.X_OK) else f"{place} is not writable"
