"""The watch of one rank: two threads beside the training thread, and what they do when a run fails.

One thread sends and receives beats (see ``beat``), and watches the next process of its host; the other measures how
long the training thread has been at the same mark. Neither touches a device or a collective, so that they work while
the training thread waits for a peer that will never come.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from megatron_sgt.config import Config
from megatron_sgt.errors import LeaseLostError, SGTError
from megatron_sgt.guard import flight_recorder, processes
from megatron_sgt.guard.beat import Beat, Listener, dead_ranks, next_visible
from megatron_sgt.guard.diagnosis import BEAT_SECONDS, Diagnosis
from megatron_sgt.guard.exit_protocol import LEAVE_SECONDS, ExitProtocol
from megatron_sgt.guard.progress import Progress
from megatron_sgt.guard.report import Failure, guess_error, is_consequence, is_timeout
from megatron_sgt.guard.store_channel import StoreChannel, StoreGoneError
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.lease import process

TICK_SECONDS = 0.5
MAX_TICK_SECONDS = 2.0
"""What a tick counts for at most: time in which the whole process was suspended is no hang."""
SEARCH_SECONDS = 6.0
"""How long a rank whose peer is gone looks for the reason."""
FOLLOW_SECONDS = 2 * BEAT_SECONDS + 0.5
"""How long rank 0, which may keep the store, stays when it alone has met what ends the run."""
RESUME = "start the run again: it goes on from the newest checkpoint"
ADVICE = f"{RESUME}; if it happens again, exclude that node"


class Watch:
    """Context around a run. ``progress`` is what the run marks; ``connect`` makes the ranks known to each other.

    Ends the process when this rank hangs or another has failed. An exception of this rank is announced to the others
    and passes through; one that merely means that a peer is gone does not: the peer is named.
    """

    def __init__(self, config: Config, info: RankInfo) -> None:
        self.progress = Progress()
        self._info = info
        self._limits = (config.train.hang_timeout_seconds, config.train.slow_phase_timeout_seconds)
        self._num_stages = config.parallel.pipeline_model_parallel_size
        self._failures = Path(config.logging.run_dir) / "failures"
        self._stop = threading.Event()
        self._training_thread = threading.get_ident()
        self._kills_before = processes.oom_kills()
        self._exit = ExitProtocol(info.rank, info.world_size, self._failures, None)
        self._diagnosis: Diagnosis | None = None

    def __enter__(self) -> Watch:
        faulthandler.enable(all_threads=True)  # SIGSEGV, SIGBUS (a full /dev/shm), SIGABRT: with stacks
        faulthandler.register(signal.SIGUSR2, all_threads=True)  # stacks, even of a process stuck in C code
        if self._limits[0] > 0:
            self._start(self._watch_progress)
        return self

    def connect(self) -> None:
        """Make all ranks known to each other; collective, once the process groups are up."""
        if self._info.world_size == 1:
            return
        attempt = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        everyone: list[Any] = [None] * self._info.world_size
        dist.all_gather_object(everyone, (process.own_identity(), attempt))
        store = dist.distributed_c10d._get_default_store()
        folder = self._failures / everyone[0][1]
        self._exit = ExitProtocol(self._info.rank, self._info.world_size, folder, StoreChannel(store))
        identities = [identity for identity, _ in everyone]
        queued = flight_recorder.queues_collectives()
        keeper = "TORCHELASTIC_RUN_ID" not in os.environ
        self._diagnosis = Diagnosis(self._exit, identities, keeper, queued, self._num_stages)
        if queued:
            flight_recorder.let_torch_write_to(folder)
            with contextlib.suppress(OSError):  # torch creates none; a run that ends well removes it
                folder.mkdir(parents=True, exist_ok=True)
        channel = StoreChannel(store)
        self._start(lambda: self._exchange_beats(channel, identities))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if error is None:
            for folder in (self._exit.folder, self._failures):
                with contextlib.suppress(OSError):  # not empty: kept
                    folder.rmdir()
        if self._diagnosis is None or not isinstance(error, Exception):
            return
        if isinstance(error, SGTError):
            self._exit.claim(self._own_failure("mistake", str(error), error.exit_code))
            if isinstance(error, LeaseLostError):  # rank 0's alone: the others hear of it while its store is there
                time.sleep(FOLLOW_SECONDS)
        elif is_consequence(error):
            self._search(error, self._diagnosis)
        elif is_timeout(error):
            self._hang(f"a collective gave up: {guess_error(error)}")
        else:
            failure = self._own_failure("error", guess_error(error))
            if self._exit.claim(failure).reported_by == self._info.rank:
                self._exit.report(failure, RESUME)

    def _own_failure(self, kind: str, cause: str, code: int = 1) -> Failure:
        host = os.uname().nodename
        return Failure(kind, self._info.rank, host, self.progress.mark.place, cause, int(code))

    def _start(self, work: Callable[[], None]) -> None:
        threading.Thread(target=self._guarded, args=(work,), daemon=True, name="watch").start()

    def _guarded(self, work: Callable[[], None]) -> None:
        """An error in a watching thread must not keep a failing process alive."""
        try:
            work()
        except Exception:
            traceback.print_exc()
            if self._exit.is_taken:
                self._exit.leave(1)

    def _exchange_beats(self, channel: StoreChannel, identities: list[process.Identity]) -> None:
        rank, number, listener = self._info.rank, 0, Listener()
        neighbour = next_visible(rank, identities)
        ahead = (rank + 1) % self._info.world_size
        while not self._stop.wait(BEAT_SECONDS):
            number += 1
            try:
                channel.put(f"beat/{rank}", self._beat(number).text())
                failed, heard = channel.get(["failed", f"beat/{ahead}"])
            except StoreGoneError:
                failed, heard = self._exit.claimed_file(), None
            if failed and not self._stop.is_set():
                self._exit.follow(Failure.from_text(failed))
            if heard:
                listener.hear(ahead, Beat.from_text(heard), time.monotonic())
            gone: list[int] = []
            if neighbour is not None and process.process_state(identities[neighbour]) is None:
                gone = [neighbour]
            elif neighbour != ahead and listener.is_lost(ahead, time.monotonic()):
                gone = [ahead]
            if gone and not self._stop.wait(BEAT_SECONDS):  # not the end of a finished run
                self._lose(gone)

    def _beat(self, number: int) -> Beat:
        kills = processes.oom_kills() - self._kills_before
        return Beat.of(number, self.progress.mark, kills, round(processes.shm_used(), 3))

    def _search(self, error: Exception, diagnosis: Diagnosis) -> NoReturn:
        """A peer is gone: find out which, and why."""
        deadline = time.monotonic() + SEARCH_SECONDS
        while time.monotonic() < deadline:
            known = self._exit.known_failure()
            if known is not None:
                self._exit.follow(known)
            dead = dead_ranks(diagnosis.identities, self._info.rank)
            if dead:
                self._lose(dead)
            time.sleep(0.25)
        silent = diagnosis.silent()
        if silent:
            self._lose(silent)
        self._exit.fail(self._own_failure("error", guess_error(error)), ADVICE)

    def _lose(self, dead: list[int]) -> NoReturn:
        assert self._diagnosis is not None
        self._exit.take()
        failure, details = self._diagnosis.loss(dead, self._beat(0))
        self._exit.fail(failure, ADVICE, details)

    def _watch_progress(self) -> None:
        idle, last, count = 0.0, time.monotonic(), -1
        while not self._stop.wait(TICK_SECONDS):
            now, mark = time.monotonic(), self.progress.mark
            idle = idle + min(now - last, MAX_TICK_SECONDS) if mark.count == count else 0.0
            last, count = now, mark.count
            if idle > self._limits[0 if mark.quick else 1]:
                setting = "hang_timeout_seconds" if mark.quick else "slow_phase_timeout_seconds"
                self._hang(f"no progress for {idle:.0f} s (train.{setting})")

    def _hang(self, what: str) -> NoReturn:
        self._exit.take()
        place = self.progress.mark.place
        where = processes.whereabouts(self._training_thread)
        self._exit.dump_stacks(f"{what}, in {place}")
        if self._diagnosis is None:
            self._exit.report(self._own_failure("hang", f"{what}; {where}"), RESUME)
            self._exit.leave(1)
        if not self._diagnosis.is_reporter(where):
            deadline = time.monotonic() + SEARCH_SECONDS
            while self._exit.known_failure() is None and time.monotonic() < deadline:
                time.sleep(TICK_SECONDS)
            self._exit.dump_collectives()
            time.sleep(LEAVE_SECONDS)
            self._exit.leave(1)
        failure, details = self._diagnosis.hang(what, place)
        folder = self._exit.folder
        # Torch's tool knows NCCL's process groups, not gloo's.
        compare = f" (torchfrtrace -p {flight_recorder.PREFIX} {folder} compares them)"
        records = f"stacks and collectives of all ranks: {folder}{compare if self._diagnosis.queued else ''}"
        self._exit.fail(failure, f"{records}; {RESUME if failure.rank is None else ADVICE}", details)
