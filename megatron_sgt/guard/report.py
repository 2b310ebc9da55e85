"""The text that a person reads when a run fails: which rank was first, where, doing what, and probably why. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from megatron_sgt.guard.beat import Beat
from megatron_sgt.guard.processes import SHM_FULL

_STATES = {
    "T": "stopped by a signal (SIGSTOP, or a debugger)",
    "t": "stopped by a debugger",
    "D": "waiting for a device or a file system",
}


@dataclass(frozen=True)
class Failure:
    """The run's first failure.

    ``kind``: error (an exception), lost (a process that is gone), hang, or mistake (the user's, which that rank prints
    itself). ``rank`` None (and no ``host``): a hang of no single rank. ``code``: the exit code of every rank.
    ``reported_by``: the rank that has claimed it; several may find the same.
    """

    kind: str
    rank: int | None
    host: str
    place: str
    cause: str
    code: int = 1
    reported_by: int | None = field(default=None, compare=False)

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Failure:
        return cls(**json.loads(text))

    @property
    def who(self) -> str:
        return "every rank" if self.rank is None else f"rank {self.rank}"

    def block(self, world_size: int, advice: str, details: Sequence[str] = ()) -> str:
        verb = {"error": "FAILED", "lost": "LOST", "hang": "HANG"}[self.kind]
        who = f"all {world_size} ranks" if self.rank is None else f"{self.who} of {world_size} on {self.host}"
        head = f"{verb}  {who}, in {self.place}"
        return "\n".join([head, f"  cause  {self.cause}", f"  next   {advice}", *(f"  {d}" for d in details)])


def guess_loss(host: str, beats: Mapping[str, Sequence[Beat]], all_of_host: bool) -> str:
    """Why a process that left no message is probably gone.

    Args:
        beats: by host, the last beats of all its ranks.
        all_of_host: every rank of ``host`` is gone, and there are other hosts.
    """
    here = beats.get(host, ())
    kills = max((beat.oom_kills for beat in here), default=0)
    used = max((beat.shm for beat in here), default=0.0)
    if kills:
        return (
            f"the kernel's OOM killer: {host} ran out of memory ({kills} processes killed since the start). "
            "Fewer data.num_workers or ranks per node, or more memory"
        )
    if used >= SHM_FULL:
        return f"/dev/shm of {host} is {used:.0%} full: make it larger, or set data.num_workers lower"
    if all_of_host:
        return f"the node {host} is lost, or its network"
    return (
        "the process is gone without a message: killed by a signal (SIGKILL; its launcher, the scheduler, or the "
        f"OOM killer of another control group: see dmesg on {host}), or it crashed (see its own stderr)"
    )


def guess_error(error: BaseException) -> str:
    """An exception in one line, with what it usually means."""
    text = str(error).strip().splitlines()
    line = f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
    low = " ".join(text).lower()
    if "out of memory" in low or isinstance(error, MemoryError):
        return f"{line} (memory: lower train.micro_batch_size, or set train.recompute_granularity)"
    if "shm" in low or "bus error" in low:
        return f"{line} (/dev/shm: make it larger, or set data.num_workers lower)"
    if "dataloader worker" in low:
        return f"{line} (a data worker died: out of memory or /dev/shm; set data.num_workers lower)"
    return f"{line} (its traceback stands in that rank's stderr)"


def state_words(letter: str | None) -> str:
    """What a process state means for a hang; "" for one that says nothing."""
    return "gone" if letter is None else _STATES.get(letter, "")


_CONSEQUENCES = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "gloo/transport",
    "ncclremoteerror",
    "nccl communicator was aborted",
    "failed to recv",
    "heartbeat",
    "otherrankfailederror",
    "socket closed",
)
_TIMEOUTS = ("timed out waiting", "wait timeout", "watchdog caught collective operation timeout")


def is_consequence(error: BaseException) -> bool:
    """Whether an exception merely means that a peer is gone."""
    return _says(error, _CONSEQUENCES) and not is_timeout(error)


def is_timeout(error: BaseException) -> bool:
    """Whether an exception means that a collective has waited too long."""
    return _says(error, _TIMEOUTS)


def _says(error: BaseException, words: Sequence[str]) -> bool:
    low = f"{type(error).__name__}: {error}".lower()
    return isinstance(error, RuntimeError | OSError) and any(word in low for word in words)
