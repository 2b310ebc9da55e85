"""The right to write into a folder: taken, kept alive by signs of life, checked before each write, given back."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from megatron_sgt.errors import LeaseError, LeaseLostError
from megatron_sgt.lease import lease_file
from megatron_sgt.lease.holder import Holder, name_of
from megatron_sgt.lease.judge import BEATS_PER_TIMEOUT, Verdict, judge, shows_life
from megatron_sgt.lease.lease_file import Seen
from megatron_sgt.lease.process import process_state, visible

LEASE_FILE = "writer.json"
TIMEOUT = 120.0
"""Seconds without a sign of life after which a holder counts as dead, where nothing better is known of it."""
_TRIES = 50
_held: set[Lease] = set()


def inside(folder: Path) -> Path:
    """Where the lease of ``folder`` lies."""
    return folder / LEASE_FILE


def beside(path: Path) -> Path:
    """Where the lease of a file or folder lies that is made as a whole and renamed to ``path``."""
    path = path.absolute()
    return path.with_name(f"{path.name}.{LEASE_FILE}")


def holder_of(path: Path) -> Holder | None:
    """Who holds the lease at ``path``, for one who only reads; None if nobody does, or its process is gone."""
    try:
        seen = lease_file.read(path)
    except OSError:
        return None
    holder = None if seen is None else seen.holder
    if holder is None or holder.left:
        return None
    here = Holder.here("", TIMEOUT).process
    return None if visible(holder.process, here) and process_state(holder.process) is None else holder


class Lease:
    """The lease at ``path``, from ``take`` to ``release``.

    Args:
        what: the holder is, for those whom it keeps out: "a run".
        subject: what is held, in messages; default: the folder of ``path``.
        fix: what else one who is kept out may do, in words.
        timeout: seconds without a sign of life after which this holder counts as dead.
        say: takes a line for the user.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        fix: str,
        subject: Path | None = None,
        timeout: float = TIMEOUT,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.path = path.absolute()
        self.subject = subject or path.parent
        self.remade: float | None = None
        """When the folder was found deleted or moved away, and made again (seconds since 1970); None: never."""
        self._fix = fix
        self._own = Holder.here(what, timeout)
        self._say = say or _print
        self._descriptor: int | None = None
        self._beats = 0
        self._lost: LeaseLostError | None = None
        self._made: list[Path] = []
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._seen_alive = _clocks()
        self._was_silent = False

    def take(self) -> None:
        """Take the lease, from a holder that is gone if need be; that may take the time for which one is watched.

        Raises:
            LeaseError: its holder is alive. Nothing is left behind.
            OSError: it cannot be written.
        """
        try:
            for _ in range(_TRIES):
                seen = lease_file.read(self.path)
                if seen is not None and not self._take_over(seen):
                    continue
                if self._create():
                    break
            else:
                raise LeaseError(f"{self.path} changes hands all the time; start this alone")
        except BaseException:
            self._remove_made()
            raise
        _held.add(self)
        threading.Thread(target=self._beat, daemon=True, name="lease").start()

    def check(self) -> None:
        """Return if this process may still write here; to be called just before each write.

        A lease that was deleted with its folder is made again. A file system that does not answer takes nothing away.

        Raises:
            LeaseLostError: another has taken it over.
        """
        with self._lock:
            if self._lost is not None:
                raise self._lost
            if self._descriptor is None:
                raise LeaseError(f"{self.subject} is no longer held by this process")
            with suppress(OSError):
                seen = lease_file.read(self.path)
                self._note_silence()
                if seen is None and self._was_silent:  # or the folder is gone: who knows what was there meanwhile
                    self._lost = LeaseLostError(self._lost_to(None))
                elif seen is None:
                    seen = self._make_again()
                if seen is not None and not self._is_own(seen):
                    since = "" if seen.holder is None else f" since {seen.holder.began}"
                    self._lost = LeaseLostError(self._lost_to(f"{name_of(seen.holder, self.path)}{since}"))
                self._was_silent = False
            if self._lost is not None:
                raise self._lost

    def release(self) -> None:
        """Give the lease back; folders that this process has made for it and left empty go with it."""
        if os.getpid() != self._own.process.pid:  # a fork holds nothing
            return
        self._released.set()
        _held.discard(self)
        with self._lock:
            if self._descriptor is None:
                return
            with suppress(OSError):
                lease_file.take_away(self.path, self._is_own)
            os.close(self._descriptor)
            self._descriptor = None
        self._remove_made()

    def _take_over(self, seen: Seen) -> bool:
        """Remove a lease whose holder is gone; False: something else is there by now.

        Raises:
            LeaseError: the holder is alive.
        """
        judgement = judge(self.path, seen, self._own)
        who, reason = name_of(seen.holder, self.path), judgement.reason
        if judgement.verdict is Verdict.SILENT:
            self._say(
                f"{self.subject} is held by {who}, who cannot be asked from here: watched for up to "
                f"{judgement.seconds:.0f} s, then taken over if there is no sign of life"
            )
            if shows_life(self.path, seen, judgement.seconds):
                now = lease_file.read(self.path)
                if now is None or self._token(now) != self._token(seen):
                    return False
                raise LeaseError(self._refusal(now, ""))
            reason = "there was no sign of life"
        elif judgement.verdict is Verdict.ALIVE:
            raise LeaseError(self._refusal(seen, reason))
        if not lease_file.take_away(self.path, lambda now: now.content == seen.content):
            return False
        if reason:
            self._say(f"{self.subject} is taken over from {who}: {reason}")
        return True

    def _create(self) -> bool:
        folder = self.path.parent
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made += [place for place in missing if place not in self._made]
        try:
            descriptor = lease_file.create(self.path, self._own.encoded(self._beats))
        except FileNotFoundError:  # the folder has gone again, or another start has cleared up
            return False
        if descriptor is None:
            return False
        seen = lease_file.read(self.path)
        if seen is None or not self._is_own(seen):
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        lease_file.clear(self.path)
        return True

    def _make_again(self) -> Seen | None:
        """Hold the folder again after it has gone; returns the lease of another that was faster."""
        before = self._descriptor
        if not self._create():
            return lease_file.read(self.path)
        if before is not None:
            with suppress(OSError):  # where the folder was moved to, nobody is kept out
                lease_file.rewrite(before, replace(self._own, left=True).encoded(self._beats))
            os.close(before)
        self.remade = time.time()
        self._say(
            f"{self.subject}, or what was in it, was deleted or moved away while {self._own.what} writes into it; "
            "it is made again, and what is written from now on lies there"
        )
        return None

    def _beat(self) -> None:
        while not self._released.wait(self._own.timeout / BEATS_PER_TIMEOUT):
            with self._lock:
                self._note_silence()
                if self._descriptor is None:
                    continue
                copy = os.dup(self._descriptor)  # which nobody closes, while the disk takes its time
                self._beats += 1
            try:
                lease_file.rewrite(copy, self._own.encoded(self._beats))
            except OSError:  # a full or absent disk: the next one may pass
                pass
            finally:
                os.close(copy)

    def _note_silence(self) -> None:
        """Note whether this process, or its machine, has stood still for so long that it may have counted as dead."""
        before, self._seen_alive = self._seen_alive, _clocks()
        gaps = [now - then for then, now in zip(before, self._seen_alive, strict=True)]
        self._was_silent = self._was_silent or max(gaps) > self._own.timeout / 2

    def _is_own(self, seen: Seen) -> bool:
        if seen.holder is not None or self._descriptor is None:
            return self._token(seen) == self._own.token
        about = os.fstat(self._descriptor)  # edited by hand, but this one still
        return seen.inode == (about.st_dev, about.st_ino)

    @staticmethod
    def _token(seen: Seen) -> str | bytes:
        return seen.content if seen.holder is None else seen.holder.token

    def _remove_made(self) -> None:
        for folder in self._made:  # the deepest first
            with suppress(OSError):
                folder.rmdir()

    def _refusal(self, seen: Seen, reason: str) -> str:
        holder = seen.holder
        since = "" if holder is None else f" since {holder.began}"
        quiet = max(0.0, time.time() - seen.mtime)
        end = "end it" if holder is None else f"end it ({holder.how_to_end})"
        return (
            f"{self.subject} is held by {name_of(holder, self.path)}{since}, last sign of life {quiet:.0f} s ago"
            f"{f' ({reason})' if reason else ''}: two writers in one folder would delete each other's files. Wait for "
            f"its end, {end}, or {self._fix}"
        )

    def _lost_to(self, who: str | None) -> str:
        held_by = "was held by another, or is gone" if who is None else f"is held by {who}"
        return (
            f"{self.subject} {held_by}: this process gave no sign of life for too long (it was stopped, or its machine "
            "was), and was taken for dead. It ends now and writes nothing more there; the newest checkpoint there is "
            "the other's, and a new start goes on from it"
        )


class Hold:
    """Several leases that stand and fall together; without any, nothing is ever refused."""

    def __init__(self) -> None:
        self.leases: list[Lease] = []

    def take(self, *leases: Lease) -> None:
        """Take all of them; those of one folder once.

        Raises:
            LeaseError: one cannot be had. None is held then.
            OSError: one cannot be written.
        """
        try:
            for lease in leases:
                if all(os.path.realpath(lease.path) != os.path.realpath(other.path) for other in self.leases):
                    lease.take()
                    self.leases.append(lease)
        except BaseException:
            self.release()
            raise

    def check(self) -> None:
        """As ``Lease.check``, of all of them."""
        for lease in self.leases:
            lease.check()

    @property
    def remade(self) -> list[Lease]:
        """Those whose folder was deleted or moved away, and made again."""
        return [lease for lease in self.leases if lease.remade is not None]

    def release(self) -> None:
        for lease in reversed(self.leases):
            lease.release()


@contextmanager
def held(lease: Lease) -> Iterator[Lease]:
    """``lease``, taken for as long as the block lasts.

    Raises:
        LeaseError: it cannot be had.
        OSError: it cannot be written.
    """
    lease.take()
    try:
        yield lease
    finally:
        lease.release()


def release_all(seconds: float = 2.0) -> None:
    """Give back all that this process holds, because it ends; a file system that hangs delays that no longer."""
    thread = threading.Thread(target=_release_held, daemon=True)
    if _held:
        thread.start()
        thread.join(seconds)


def _clocks() -> tuple[float, float]:
    """One that runs while the machine sleeps, and one that is set right after a virtual machine was stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME), time.time()


def _print(line: str) -> None:
    print(f"LEASE  {line}", file=sys.stderr, flush=True)


def _release_held() -> None:
    for lease in list(_held):
        lease.release()


atexit.register(_release_held)
