"""How a rank leaves a failing run: the first failure is claimed by one rank, reported once, and ends all ranks.

It is claimed in the store that the ranks share, and in a file of the run directory, for when the store is gone.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, TypeVar

from megatron_sgt.guard import flight_recorder
from megatron_sgt.guard.report import Failure
from megatron_sgt.guard.store_channel import StoreChannel, StoreGoneError, bounded
from megatron_sgt.lease import release_all

T = TypeVar("T")

STORE_SECONDS = 3.0
"""How long the store has to answer when a run is failing."""
LEAVE_SECONDS = 1.5
"""How long a rank waits before it follows another's failure, which must be reported first."""
RECORD_SECONDS = 5.0
"""How long the flight recorder has to answer; after twice that time the process ends, whatever blocks it."""
FIRST_FILE = "first.json"
REPORT_FILE = "report.txt"


class ExitProtocol:
    """Of ``rank`` among ``world_size``; reports go to ``folder``, which is created with the first one.

    ``channel``: to the store; None for a run of one process.
    """

    def __init__(self, rank: int, world_size: int, folder: Path, channel: StoreChannel | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.folder = folder
        self.store_gone = channel is None
        self._channel = channel
        self._taken = threading.Lock()
        self._taker: int | None = None

    def ask(self, question: Callable[[StoreChannel], T]) -> T:
        """Ask the store.

        Raises:
            StoreGoneError: at once if it was raised before.
        """
        channel = self._channel
        if self.store_gone or channel is None:
            raise StoreGoneError("no answer before")
        try:
            return bounded(lambda: question(channel), STORE_SECONDS)
        except StoreGoneError:
            self.store_gone = True
            raise

    def take(self) -> None:
        """Reserve the end of this process for the calling thread; any other that calls this blocks for good."""
        if self._taker != threading.get_ident():
            self._taken.acquire()
            self._taker = threading.get_ident()

    @property
    def is_taken(self) -> bool:
        return self._taken.locked()

    def claim(self, failure: Failure) -> Failure:
        """The run's first failure: ``failure``, reported by this rank, unless another rank was faster."""
        text = replace(failure, reported_by=self.rank).text()
        try:
            first = Failure.from_text(self.ask(lambda channel: channel.claim("failed", text)))
        except StoreGoneError:
            return Failure.from_text(self._claim_file(text))
        if first.reported_by == self.rank and failure.kind != "mistake":
            self._claim_file(text)  # for a rank that looks when the store has left with rank 0
        return first

    def _claim_file(self, text: str) -> str:
        path = self.folder / FIRST_FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            own = path.with_name(f"first.{self.rank}")
            own.write_text(text, encoding="utf-8")
            try:
                os.link(own, path)  # whole or not at all, for one of all ranks
            except FileExistsError:
                text = path.read_text(encoding="utf-8")
            own.unlink()
        except OSError:  # no file system either: better reported twice than not at all
            pass
        return text

    def known_failure(self) -> Failure | None:
        try:
            text = self.ask(lambda channel: channel.get(["failed"]))[0]
        except StoreGoneError:
            text = self.claimed_file()
        return Failure.from_text(text) if text else None

    def claimed_file(self) -> str | None:
        """The failure that was claimed in the file, as text; None if none was."""
        try:
            return (self.folder / FIRST_FILE).read_text(encoding="utf-8")
        except OSError:
            return None

    def report(self, failure: Failure, advice: str, details: Sequence[str] = ()) -> None:
        block = failure.block(self.world_size, advice, details)
        print(block, file=sys.stderr, flush=True)
        self._write(REPORT_FILE, f"{block}\n")

    def fail(self, failure: Failure, advice: str, details: Sequence[str] = ()) -> NoReturn:
        """Claim the failure, report it and exit; or follow the one that was claimed before."""
        self.take()
        first = self.claim(failure)
        if first.reported_by != self.rank:
            self.follow(first)
        self.report(failure, advice, details)
        if failure.kind == "hang":
            self.dump_collectives()
            time.sleep(LEAVE_SECONDS)  # a launcher ends the others, which write too, when the first has left
        self.leave(failure.code)

    def follow(self, failure: Failure) -> NoReturn:
        """Exit because another rank has failed; after a hang, write this rank's stacks first."""
        self.take()
        if failure.kind == "hang":
            self.dump_stacks(f"{failure.who} hangs, in {failure.place}")
            self.dump_collectives()
        time.sleep(LEAVE_SECONDS)
        self.leave(failure.code)

    def dump_stacks(self, why: str) -> None:
        """The Python stacks of all threads, to stderr and to this rank's file in the run directory."""
        print(f"[rank {self.rank}] {why}; stacks of all threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        name = f"rank_{self.rank:05d}.stacks.txt"
        if self._write(name, f"{why}\n"):
            with (self.folder / name).open("a", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)

    def dump_collectives(self) -> None:
        """What this rank's collectives were doing, to its files in the run directory; after the hang was reported.

        Reading it asks the driver about every collective. If that never returns, this thread continues without it;
        if it holds Python's lock as well, a timer that needs no lock ends the process.
        """
        faulthandler.dump_traceback_later(2 * RECORD_SECONDS, exit=True, file=2)
        try:
            said = bounded(lambda: flight_recorder.write(self.folder, self.rank), RECORD_SECONDS)
        except Exception as error:
            said = f"no record of its collectives: {error}"
        finally:
            faulthandler.cancel_dump_traceback_later()
        print(f"[rank {self.rank}] {said}", file=sys.stderr, flush=True)

    def _write(self, name: str, text: str) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            print(f"cannot write {self.folder / name}: {error}", file=sys.stderr)
            return False
        return True

    def leave(self, code: int) -> NoReturn:
        """End this process at once: its training thread may be blocked in a collective for good."""
        sys.stdout.flush()
        sys.stderr.flush()
        release_all()
        os._exit(code)
