"""The file of a lease: made at once or not at all, beaten in place, taken away only if it is the one that was judged.

It is written aside and linked to its name: the link is atomic on NFS and Lustre too, where locks and exclusive creation
may not be. Its holder keeps it open and writes its signs of life into the open file, never under the name: after the
name has passed on to another, they reach nobody.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_sgt.files import TEMPORARY_SUFFIX
from megatron_sgt.lease.holder import Holder

_LONGEST = 1 << 16
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)


@dataclass(frozen=True)
class Seen:
    """A lease as it was read. ``holder``: None where the content is no lease; ``mtime``: of the file server's clock."""

    content: bytes
    mtime: float
    inode: tuple[int, int]

    @property
    def holder(self) -> Holder | None:
        try:
            return Holder.decoded(self.content)
        except ValueError:
            return None


def read(path: Path) -> Seen | None:
    """The lease at ``path``; None if there is none.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:  # opening asks the server, where attributes alone may be cached
            about = os.fstat(file.fileno())
            return Seen(file.read(_LONGEST), about.st_mtime, (about.st_dev, about.st_ino))
    except FileNotFoundError:
        return None


def create(path: Path, content: bytes) -> int | None:
    """Make the lease; returns its open file, None if there is one already.

    Raises:
        OSError: it cannot be written.
    """
    aside = _aside(path)
    descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
        try:
            os.link(aside, path)
        except FileExistsError:
            if os.fstat(descriptor).st_nlink != 2:  # an answer of the server that was lost, the link is made
                raise
        return descriptor
    except FileExistsError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        if error.errno in _NO_LINKS:  # a file system without hard links
            return _create_exclusively(path, content)
        raise
    finally:
        aside.unlink(missing_ok=True)


def _create_exclusively(path: Path, content: bytes) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    os.write(descriptor, content)
    os.fsync(descriptor)
    return descriptor


def rewrite(descriptor: int, content: bytes) -> None:
    """Give the open lease another content of the same length.

    Raises:
        OSError: it cannot be written.
    """
    os.pwrite(descriptor, content, 0)
    os.fsync(descriptor)


def take_away(path: Path, is_it: Callable[[Seen], bool]) -> bool:
    """Remove the lease if ``is_it``; False if another has come in its place meanwhile.

    It is renamed first, then looked at again: of two that find the same dead lease one removes it, and the other does
    not remove the lease that was made since.

    Raises:
        OSError: it cannot be removed.
    """
    seen = read(path)
    if seen is None:
        return True
    if not is_it(seen):
        return False
    aside = _aside(path)
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return True
    moved = read(aside)
    if moved is not None and not is_it(moved):
        with suppress(OSError):  # its holder makes it again, with the same token, if it looks meanwhile
            os.link(aside, path)
        aside.unlink(missing_ok=True)
        return False
    aside.unlink(missing_ok=True)
    return True


def age(path: Path, seen: Seen) -> float:
    """Seconds since the lease was written, by the clock of the file server alone.

    Raises:
        OSError: nothing can be written beside it.
    """
    probe = _aside(path)
    descriptor = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(descriptor, b"\n")
        os.fsync(descriptor)
        return os.fstat(descriptor).st_mtime - seen.mtime
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)


def clear(path: Path) -> None:
    """Delete what starts that were killed have left beside ``path``; one that is going on begins again."""
    for left in path.parent.glob(f"{path.name}.*{TEMPORARY_SUFFIX}"):
        with suppress(OSError):
            left.unlink()


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
