"""What a folder holds, links followed: no folder and no file is met twice, and nothing is passed over in silence."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_sgt.errors import DataError


@dataclass(frozen=True)
class Found:
    """A file of a folder, under the name that leads to it."""

    path: Path
    identity: str
    """Equal for two names of one file."""
    target: str
    """The file's own name, which a link may not have."""
    linked: bool
    """Whether a link led here."""


@dataclass(frozen=True)
class PassedOver:
    """Something in a folder that is no file to read, and why."""

    path: Path
    reason: str
    """As it is said: "hidden", "broken link", "upward link" (to a folder above it), "FIFO", ..."""


class Folders:
    """Searches folders; one search knows what the earlier ones have met."""

    def __init__(self) -> None:
        self.repeated: list[tuple[Path, Path]] = []
        """(folder, the name under which it was searched before)"""
        self.passed_over: list[PassedOver] = []
        self._searched: dict[str, Path] = {}

    def search(self, root: Path) -> list[Found]:
        """All visible files below ``root``, in the order of their sorted paths.

        Folders reached by a link come after all others, so that what has a place of its own is found there. A link to
        a folder above it is not followed.

        Raises:
            DataError: a folder cannot be read.
        """
        found: list[Found] = []
        plain, linked = [(root, False)], list[tuple[Path, bool]]()
        while plain or linked:
            folder, by_link = plain.pop() if plain else linked.pop(0)
            real = os.path.realpath(folder)
            if real in self._searched:
                self.repeated.append((folder, self._searched[real]))
                continue
            self._searched[real] = folder
            for entry in _entries(folder):
                path, is_link = folder / entry.name, entry.is_symlink()
                status = self._status(entry, path)
                if status is None:
                    continue
                if not stat.S_ISDIR(status.st_mode):
                    found += self._file(path, status, os.path.join(real, entry.name), is_link, by_link)
                elif not is_link:
                    plain.append((path, by_link))
                elif _is_above(os.path.realpath(path), real):
                    self.passed_over.append(PassedOver(path, "upward link"))
                else:
                    linked.append((path, True))
        return sorted(found, key=lambda file: file.path.relative_to(root).parts)

    def _status(self, entry: os.DirEntry[str], path: Path) -> os.stat_result | None:
        """Of what ``entry`` leads to; None, and noted, if it is hidden or leads nowhere."""
        if entry.name.startswith("."):
            self.passed_over.append(PassedOver(path, "hidden"))
            return None
        try:
            return entry.stat()
        except OSError as error:
            if not entry.is_symlink():
                raise DataError(f"cannot read {path}: {error.strerror}") from error
            self.passed_over.append(PassedOver(path, "broken link"))
            return None

    def _file(self, path: Path, status: os.stat_result, place: str, is_link: bool, by_link: bool) -> Iterator[Found]:
        if stat.S_ISREG(status.st_mode):
            target = os.path.realpath(place) if is_link else place
            yield Found(path, identity_of(status, target), target, is_link or by_link)
        else:
            self.passed_over.append(PassedOver(path, kind_of(status.st_mode)))


def identity_of(status: os.stat_result, target: str) -> str:
    """Equal for two names of one file; ``target`` is its path without links.

    Only hard links are told by the inode: some network file systems do not keep those of other files apart.
    """
    return f"{status.st_dev}:{status.st_ino}" if status.st_nlink > 1 else target


def kind_of(mode: int) -> str:
    """What a path that is neither a file nor a folder is."""
    kinds = ((stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "special file")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error


def _is_above(folder: str, place: str) -> bool:
    return os.path.commonpath([folder, place]) == folder
