"""Receives signals in a thread of its own, which also ends a process that cannot stop in order.

Python runs signal handlers in the main thread only, and not while that thread is blocked in a collective. So
Python's C handler only writes the signal's number to a socket (signal.set_wakeup_fd), and a thread reads it,
whatever the main thread does. That thread forces the exit

- when a signal comes again, more than ``REPEAT_S`` after the first: launchers forward what the terminal or the
  scheduler has already sent to every process, so that two at once are one;
- when the running step, or the save that follows it, has not ended ``grace_s`` after the request: a peer is
  gone, or a collective hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from megatron_sgt.errors import ExitCode
from megatron_sgt.guard.stop import SIGNALS, Reason, StopRequests, named
from megatron_sgt.lease import release_all

REPEAT_S = 3.0


@contextlib.contextmanager
def listening(stop: StopRequests, grace_s: float) -> Iterator[None]:
    """Let signals reach ``stop`` inside the context; main thread only.

    A SIGHUP that was ignored before stays ignored: so ``nohup`` says that the run outlives its terminal.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    watch = _Watch(stop, grace_s, reader)
    # A number that is no signal: the grace time starts again for the save, on every rank.
    stop.on_agreed = lambda reason: watch.begin(reason, wake=writer)

    def handler(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and not stop.training:
            raise KeyboardInterrupt

    outlived = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    handlers = {signum: signal.signal(signum, handler) for signum in SIGNALS if signum not in outlived}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch.run, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for signum, previous in handlers.items():
            signal.signal(signum, previous)
        writer.close()
        thread.join()
        reader.close()


class _Watch:
    """What the thread does: pass signals on, and watch the deadline."""

    def __init__(self, stop: StopRequests, grace_s: float, reader: socket.socket) -> None:
        self._stop = stop
        self._grace_s = grace_s
        self._reader = reader
        self._came: dict[int, float] = {}
        self._deadline: float | None = None
        self._reason: int = Reason.NONE

    def begin(self, reason: int, wake: socket.socket | None = None) -> None:
        self._reason, self._deadline = reason, time.monotonic() + self._grace_s
        if wake is not None:
            wake.send(b"\0")

    def run(self) -> None:
        while True:
            left = None if self._deadline is None else self._deadline - time.monotonic()
            if left is not None and left <= 0:
                faulthandler.dump_traceback()
                _force(
                    f"the run has not stopped {self._grace_s:g} s after the request ({named(self._reason)}): "
                    "a rank or the storage hangs"
                )
            ready, _, _ = select.select([self._reader], [], [], left)
            if not ready:
                continue
            numbers = self._reader.recv(64)
            if not numbers:
                return
            for signum in numbers:
                self._take(signum)

    def _take(self, signum: int) -> None:
        if signum not in SIGNALS or (signum == signal.SIGINT and not self._stop.training):
            return
        now = time.monotonic()
        if signum not in self._came:
            self._came[signum] = now
            if self._deadline is None:
                self.begin(Reason.of(signum))
            self._stop.receive(signum)
        elif now - self._came[signum] > REPEAT_S:
            _force(f"{Reason.of(signum).name} came again")


def _force(cause: str) -> None:
    """Exit at once. The unfinished save does not count; the checkpoint before it is whole."""
    text = f"forced exit: {cause}. The newest finished checkpoint is whole; the steps since are lost\n"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
    release_all()
    _leave(ExitCode.FORCED)


_leave: Callable[[int], None] = os._exit
