"""What this rank is doing: written by the training thread, read by the watching ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

QUICK_PHASES = frozenset({"train", "data", "ema", "growth", "log"})
"""Parts of an ordinary step. Starting, validating, saving, growing and a model's first step may take longer."""


@dataclass(frozen=True)
class Mark:
    """Where training stands: in ``phase`` (train, data, or a hook's name) of optimizer step ``step``.

    It was entered at ``since`` (monotonic seconds) as the ``count``-th of this process; ``quick``: the time limit of
    ordinary steps applies.
    """

    phase: str
    step: int
    count: int
    since: float
    quick: bool

    @property
    def place(self) -> str:
        return f"step {self.step:,} ({self.phase})" if self.step else self.phase


class Progress:
    """The present mark. Replacing a reference is atomic, so that no reader sees half of one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._warm = False
        self.mark = Mark("start", 0, 0, clock(), False)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Mark the begin of ``phase`` of ``step`` (None: the same step as before)."""
        before = self.mark
        step = before.step if step is None else step
        quick = self._warm and phase in QUICK_PHASES
        self.mark = Mark(phase, step, before.count + 1, self._clock(), quick)

    def step_done(self) -> None:
        """The first step, in which much is set up, is over: from now on steps are ordinary ones."""
        self._warm = True

    def model_built(self) -> None:
        """A new model is there: its first step may take as long as that of a process."""
        self._warm = False

    def idle_seconds(self) -> float:
        return self._clock() - self.mark.since
