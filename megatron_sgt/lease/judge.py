"""Whether the holder of a lease is gone, alive, or to be watched.

No clock of another host is believed: ages are differences of the file server's own times, and they only decide how long
a lease is watched. What counts is whether it changes meanwhile.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_sgt.lease import lease_file
from megatron_sgt.lease.holder import Holder
from megatron_sgt.lease.lease_file import Seen
from megatron_sgt.lease.process import process_state, visible

BEATS_PER_TIMEOUT = 12
"""Signs of life in the time after which their absence counts."""
_LEAST_WATCH = 3 / BEATS_PER_TIMEOUT
"""Part of the timeout for which a lease is watched at least: a holder that lives beats three times in it."""


class Verdict(enum.Enum):
    """What a first look at a lease says of its holder."""

    GONE = enum.auto()
    ALIVE = enum.auto()
    SILENT = enum.auto()
    """Gone for all that can be known, unless it shows a sign of life while it is watched."""


@dataclass(frozen=True)
class Judgement:
    """``reason``: in words, "" where nobody need be told; ``seconds``: to watch a silent one for."""

    verdict: Verdict
    reason: str = ""
    seconds: float = 0.0


def judge(path: Path, seen: Seen, own: Holder) -> Judgement:
    """Judge the lease ``seen`` at ``path`` for ``own``, who would like to have it.

    Raises:
        OSError: nothing can be written beside it.
    """
    holder = seen.holder
    if holder is None:
        return _watched(path, seen, own.timeout)
    limit = max(own.timeout, holder.timeout)
    if holder.left or holder.process == own.process:
        return Judgement(Verdict.GONE)
    if visible(holder.process, own.process):
        return _judge_process(path, seen, holder, limit)
    over = None if holder.job is None else holder.job.is_over(own.job)
    if over is not None and holder.job is not None:
        if over:
            return Judgement(Verdict.GONE, f"Slurm says that it is over: {holder.job.name}")
        return Judgement(Verdict.ALIVE, f"Slurm says that {holder.job.name} still runs")
    return _watched(path, seen, limit)


def _judge_process(path: Path, seen: Seen, holder: Holder, limit: float) -> Judgement:
    state = process_state(holder.process)
    if state is None:
        return Judgement(Verdict.GONE)
    if state in "Tt":
        if abs(lease_file.age(path, seen)) < limit:
            return Judgement(Verdict.ALIVE, "it is stopped by a signal; kill -CONT continues it")
        return Judgement(Verdict.GONE, "it is stopped by a signal, and silent for longer than it may be")
    if abs(time.time() - seen.mtime) < limit:
        return Judgement(Verdict.ALIVE)
    return Judgement(Verdict.SILENT, seconds=limit)


def _watched(path: Path, seen: Seen, limit: float) -> Judgement:
    quiet = lease_file.age(path, seen)
    return Judgement(Verdict.SILENT, seconds=max(limit - max(0.0, quiet), _LEAST_WATCH * limit))


def shows_life(path: Path, seen: Seen, seconds: float) -> bool:
    """Watch the lease for ``seconds`` at most, by this process's own clock; True as soon as it changes or goes.

    Raises:
        OSError: it can no longer be read.
    """
    deadline = time.monotonic() + seconds
    pause = min(1.0, seconds / 20)
    while time.monotonic() < deadline:
        time.sleep(pause)
        now = lease_file.read(path)
        if now is None or now.content != seen.content or now.mtime != seen.mtime:
            return True
    return False
