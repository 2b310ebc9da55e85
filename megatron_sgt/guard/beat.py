"""The sign of life that every rank sends once a second, and what follows from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from megatron_sgt.guard.progress import Mark
from megatron_sgt.lease.process import Identity, process_state, visible

STALE_SECONDS = 60.0
"""A rank of another node that has been silent for this long in an ordinary step is lost, with its node."""

SLOW_STALE_SECONDS = 600.0
"""The same outside ordinary steps, where compiled code (an index builder) may block a rank's threads for a while."""


@dataclass(frozen=True)
class Beat:
    """A sign of life: its running number, the rank's mark, and what its host reports.

    ``oom_kills``: processes that the kernel has killed on that host since the run began, for lack of memory; ``shm``:
    used share of its /dev/shm.
    """

    number: int
    phase: str
    step: int
    count: int
    quick: bool
    oom_kills: int
    shm: float

    @classmethod
    def of(cls, number: int, mark: Mark, oom_kills: int, shm: float) -> Beat:
        return cls(number, mark.phase, mark.step, mark.count, mark.quick, oom_kills, shm)

    @classmethod
    def from_text(cls, text: str) -> Beat:
        return cls(**json.loads(text))

    def text(self) -> str:
        return json.dumps(asdict(self))

    @property
    def place(self) -> str:
        return Mark(self.phase, self.step, self.count, 0.0, self.quick).place


class Listener:
    """Remembers when each rank's beat last changed, by this process's own clock."""

    def __init__(self) -> None:
        self.beats: dict[int, Beat] = {}
        self._changed: dict[int, float] = {}

    def hear(self, rank: int, beat: Beat, now: float) -> None:
        known = self.beats.get(rank)
        if known is None or known.number != beat.number:
            self._changed[rank] = now
        self.beats[rank] = beat

    def silent_seconds(self, rank: int, now: float) -> float:
        """Seconds since the last new beat of ``rank``; 0 if there was none."""
        return now - self._changed.get(rank, now)

    def is_lost(self, rank: int, now: float) -> bool:
        heard = self.beats.get(rank)
        limit = STALE_SECONDS if heard is not None and heard.quick else SLOW_STALE_SECONDS
        return self.silent_seconds(rank, now) > limit


def next_visible(rank: int, identities: Sequence[Identity]) -> int | None:
    """The next rank, in a ring, whose process is visible from ``rank``: the one that it watches, if any."""
    size = len(identities)
    ring = ((rank + distance) % size for distance in range(1, size))
    return next((r for r in ring if visible(identities[r], identities[rank])), None)


def dead_ranks(identities: Sequence[Identity], own: int) -> list[int]:
    """Ranks whose processes are visible from rank ``own`` and gone."""
    return [
        rank
        for rank, process in enumerate(identities)
        if rank != own and visible(process, identities[own]) and process_state(process) is None
    ]


def behind(beats: Mapping[int, Beat], stages: Sequence[int]) -> list[int]:
    """Ranks with fewer marks than others of their pipeline stage; ``stages``: the stage of every rank.

    The ranks of a stage do the same work; the stages are at different micro-batches by design.
    """
    counts: dict[int, dict[int, int]] = {}
    for rank, beat in beats.items():
        counts.setdefault(stages[rank], {})[rank] = beat.count
    return sorted(rank for ranks in counts.values() for rank in _fewest(ranks))


def in_earlier_step(beats: Mapping[int, Beat]) -> list[int]:
    """Ranks in a step that others have left: whatever the stage, a step ends for all ranks together."""
    return _fewest({rank: beat.step for rank, beat in beats.items()})


def _fewest(counts: Mapping[int, int]) -> list[int]:
    """The ranks with the fewest; none if all have the same number."""
    fewest = min(counts.values(), default=0)
    late = sorted(rank for rank, count in counts.items() if count == fewest)
    return late if len(late) < len(counts) else []
