"""Requests to stop a run before its end: which there are, and when one is due.

Any rank may receive one (a signal, or a limit of time that its clock has passed). The loop asks before every
step and lets all ranks agree, so that all stop after the same step (engine/loop.py).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from megatron_sgt.config import TrainConfig

NONE = 0
DURATION = 1001
JOB_END = 1002
_LIMITS = {DURATION: "train.exit_duration_minutes", JOB_END: "the end of the Slurm job is near"}

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Ask to save and stop: a scheduler's or launcher's SIGTERM, Slurm's warning, the keyboard."""


def named(reason: int) -> str:
    """What a reason is called in messages: the name of its signal, or of the limit that was passed."""
    return _LIMITS.get(reason) or signal.Signals(reason).name


class StopRequests:
    """The requests that this rank has received, as numbers: a signal's own, DURATION or JOB_END.

    Args:
        job_end: seconds since the epoch at which the scheduler will end the job, None if nobody said.
        now: the clock, seconds since the epoch.
    """

    def __init__(
        self, train: TrainConfig, job_end: float | None = None, now: Callable[[], float] = time.time
    ) -> None:
        self._now = now
        self._signal = NONE
        minutes = train.exit_duration_minutes
        self._duration_end = None if minutes is None else now() + 60 * minutes
        self._job_end = None if job_end is None else job_end - 60 * train.exit_before_job_end_minutes
        self._longest_save = 0.0
        self.training = False
        """Whether the loop runs: before, there is nothing to save, and the keyboard interrupts as usual."""
        self.on_agreed: Callable[[int], None] = lambda reason: None
        """Told when all ranks have agreed to stop."""

    def receive(self, signum: int) -> None:
        """Note a signal; the first one counts."""
        self._signal = self._signal or signum

    def note_save(self, seconds: float) -> None:
        """A save took so long: near the end of the job as much time is left for the last one."""
        self._longest_save = max(self._longest_save, seconds)

    def pending(self) -> int:
        """The reason for which this rank wants to stop, NONE for none."""
        if self._signal:
            return self._signal
        if self._duration_end is not None and self._now() >= self._duration_end:
            return DURATION
        if self._job_end is not None and self._now() >= self._job_end - self._longest_save:
            return JOB_END
        return NONE
