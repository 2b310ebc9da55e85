"""Requests to stop a run before its end, or to save and go on: which kinds there are, and when one is due.

Any rank may receive one (a signal, or a time limit that its clock has passed). The loop asks before every step, and
all ranks agree on the answer, so that all stop, or save, after the same step (engine/loop.py).
"""

from __future__ import annotations

import enum
import signal
import time
from collections.abc import Callable

from megatron_sgt.config import TrainConfig
from megatron_sgt.guard.save_now import SaveTrigger

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
"""Ask to save and stop: a scheduler's or launcher's SIGTERM, a terminal that is gone, Slurm's warning, Ctrl-C."""


class Reason(enum.IntEnum):
    """Why a run stops; SAVE_NOW alone stops nothing. Of several, on one rank or on many, the largest counts.

    A run that stops saves, so that no request to save is lost to a larger one.

    Launchers answer Ctrl-C, a warning or a hang-up with a SIGTERM of their own, so that SIGTERM is the least of the
    signals; a shell passes a hang-up on to jobs that were warned before, so that SIGHUP is the next.
    Which of two came first is not known: the kernel delivers two pending ones in reverse order.
    """

    NONE = 0
    SAVE_NOW = 1
    JOB_END = 2
    DURATION = 3
    SIGTERM = 4
    SIGHUP = 5
    SIGUSR1 = 6
    SIGINT = 7

    @classmethod
    def of(cls, signum: int) -> Reason:
        """The reason that one of ``SIGNALS`` is."""
        return cls[signal.Signals(signum).name]


_LIMITS = {Reason.DURATION: "train.exit_duration_minutes", Reason.JOB_END: "the end of the Slurm job is near"}


def named(reason: int) -> str:
    """A reason in messages: the name of its signal, or the limit that was passed."""
    return _LIMITS.get(Reason(reason)) or Reason(reason).name


class StopRequests:
    """The requests that this rank has received.

    Args:
        job_end: seconds since the epoch at which the scheduler will end the job, None if unknown.
        now: the clock, seconds since the epoch.
    """

    def __init__(self, train: TrainConfig, job_end: float | None = None, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._signal = Reason.NONE
        minutes = train.exit_duration_minutes
        self._duration_end = None if minutes is None else now() + 60 * minutes
        self._job_end = None if job_end is None else job_end - 60 * train.exit_before_job_end_minutes
        self._longest_save = 0.0
        self.trigger: SaveTrigger | None = None
        """Of the run's folder, on rank 0 while it holds that."""
        self.training = False
        """Whether the loop runs: before that there is nothing to save, and Ctrl-C interrupts as usual."""
        self.on_agreed: Callable[[int], None] = lambda reason: None
        """Called when all ranks have agreed to stop."""

    def receive(self, signum: int) -> None:
        self._signal = max(self._signal, Reason.of(signum))

    def note_save(self, seconds: float) -> None:
        """A save took this long: near the end of the job, that much time is left for the last one."""
        self._longest_save = max(self._longest_save, seconds)

    def expect_saves(self, times: float) -> None:
        """From now on checkpoints are ``times`` as large: saves are expected to take longer in proportion."""
        self._longest_save *= times

    def pending(self) -> Reason:
        if self._signal:
            return self._signal
        if self._duration_end is not None and self._now() >= self._duration_end:
            return Reason.DURATION
        if self._job_end is not None and self._now() >= self._job_end - self._longest_save:
            return Reason.JOB_END
        return Reason.SAVE_NOW if self.trigger is not None and self.trigger.asked() else Reason.NONE
