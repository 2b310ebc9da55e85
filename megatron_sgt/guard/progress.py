"""What this rank is doing. Written by the training thread, read by the watching ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

QUICK_PHASES = frozenset({"train", "data", "growth", "log"})
"""Parts of an ordinary step. Starting, validating, saving and the first step of a process may take longer."""


@dataclass(frozen=True)
class Mark:
    """``phase`` (train, data, or a hook's name) of optimizer step ``step``, entered at ``since`` (monotonic
    seconds) as the ``count``-th of this process; ``quick``: the ordinary time limit holds.
    """

    phase: str
    step: int
    count: int
    since: float
    quick: bool

    @property
    def place(self) -> str:
        """Words for a message: "step 7 (eval)"."""
        return f"step {self.step:,} ({self.phase})" if self.step else self.phase


class Progress:
    """The present mark. Replacing one reference is atomic, so no reader sees half of it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._warm = False
        self.mark = Mark("start", 0, 0, clock(), False)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Say that ``phase`` begins (of ``step``, None: of the same step)."""
        before = self.mark
        step = before.step if step is None else step
        quick = self._warm and phase in QUICK_PHASES
        self.mark = Mark(phase, step, before.count + 1, self._clock(), quick)

    def step_done(self) -> None:
        """From now on steps are ordinary ones: the first, with everything that is set up in it, is over."""
        self._warm = True

    def idle_seconds(self) -> float:
        """Seconds since the last mark."""
        return self._clock() - self.mark.since
