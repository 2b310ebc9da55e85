"""The run that the faults strike: its processes, its folders, and what it has reported so far."""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sgt.config import Config
from megatron_sgt.errors import SGTError
from megatron_sgt.jsonl import decode
from megatron_sgt.metrics import METRICS_FILE
from soak_parts.moments import arm, held
from soak_parts.ranks import Ranks

PATIENCE = 120.0
"""Seconds in which something must move."""


class Lost(SGTError):
    """Something that must never be lost was."""


class Running:
    """One run, started again and again. ``step_s``: what a step of it takes."""

    def __init__(self, config: Config, step_s: float) -> None:
        self.run_dir, self.root, self.step_s = Path(config.logging.run_dir), config.save_dir, step_s
        self.config, self.log = (self.run_dir.with_suffix(suffix) for suffix in (".yaml", ".log"))
        self.config.write_text(config.to_yaml(), encoding="utf-8")
        self.ranks: Ranks
        self.stopped: Ranks | None = None
        """Earlier ranks that stand still, and believe that the run is theirs."""
        self.next_start: Callable[[Running], None] = Running.start_ranks
        """How the ranks are started next, where the last fault wants to see more of it than that."""
        self._read: list[dict[str, Any]] = []
        self._offset = 0
        for folder in (self.run_dir, self.root):
            shutil.rmtree(folder, ignore_errors=True)

    def start(self) -> None:
        """Start the run again."""
        start, self.next_start = self.next_start, Running.start_ranks
        start(self)

    def start_ranks(self) -> None:
        """Start the ranks, as the same command again."""
        self.ranks = Ranks(self.config, self.log)

    def end(self) -> list[int]:
        """Exit codes of the ranks, which have a moment to leave by themselves; none of ranks that stand still."""
        return [] if self.ranks is self.stopped else self.ranks.end(3.0)

    def see_to_the_end(self) -> None:
        """Start once more if the last fault wants to see that."""
        if self.next_start is not Running.start_ranks:
            self.start()

    def leave(self) -> None:
        """Leave no process behind."""
        for ranks in (self.ranks, self.stopped):
            if ranks is not None:
                ranks.end(0.0)

    def hold_at(self, moment: str, rank: int, rng: random.Random) -> int | None:
        """Hold a thread of a rank at a moment of a save; returns the rank, None when one has left before."""
        armed = self.ranks.armed
        rank = arm(armed, rank, moment, rng)
        return rank if self.wait(lambda: held(armed, rank), poll=0.001) else None

    def records(self) -> list[dict[str, Any]]:
        """Every record of the metrics file, void ones too."""
        file = self.run_dir / METRICS_FILE
        if file.exists():
            with file.open("rb") as stream:
                stream.seek(self._offset)
                *lines, _ = stream.read().split(b"\n")
            self._offset += sum(len(line) + 1 for line in lines)
            self._read += [decode(line.decode()) for line in lines]
        return self._read

    def step(self) -> int:
        """The step that the run has come to."""
        return next((r["step"] for r in reversed(self.records()) if r["kind"] in ("train", "resume")), 0)

    def wait_steps(self, count: int) -> bool:
        """Wait until so many more steps are done; False when a rank has left before."""
        first = self.step()
        return self.wait(lambda: self.step() >= first + count)

    def wait(self, condition: Callable[[], bool], poll: float = 0.01) -> bool:
        """Wait for the condition; False when a rank has left before.

        Raises:
            Lost: nothing has come of it.
        """
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if not self.ranks.alive():
                return False
            if time.monotonic() > deadline:
                raise Lost(f"nothing moves at step {self.step()}:\n{self.said()}")
            time.sleep(poll)
        return True

    def is_saving(self) -> bool:
        """Whether a save or a deletion is going on, or was killed."""
        return any(".tmp" in path.name for path in self.root.glob("global_step*"))

    def save_seconds(self) -> float:
        """What the last save took."""
        return next((r["seconds"] for r in reversed(self.records()) if r["kind"] == "save"), 0.2)

    def said(self) -> str:
        """The end of what the ranks have printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:] if self.log.exists() else ""
