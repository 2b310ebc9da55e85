"""What happens to files: deleted, cut in half, emptied, one byte flipped, written on a full disk; undone afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DAMAGES = ("delete", "cut", "empty", "flip")


@contextlib.contextmanager
def damaged(path: Path, damage: str) -> Iterator[None]:
    """The file ``path`` with one of DAMAGES, inside the context."""
    whole, times = path.read_bytes(), path.stat()
    harm(path, damage)
    try:
        yield
    finally:
        path.write_bytes(whole)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def harm(path: Path, damage: str) -> None:
    """Do one of DAMAGES to the file ``path``, for good."""
    whole = path.read_bytes()
    if damage == "delete":
        path.unlink()
    elif damage == "flip":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")


@contextlib.contextmanager
def filling_disk(writer: Any) -> Iterator[None]:
    """Inside the context the :class:`Appender` of ``writer`` meets a disk with room for half of each piece."""
    appender = writer._file
    real = appender._file

    class Full:
        def write(self, data: bytes) -> int:
            return real.write(data[: len(data) // 2])

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    appender._file = Full()
    try:
        yield
    finally:
        appender._file = real
