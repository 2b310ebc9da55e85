"""What the operating system knows: whether a process exists, memory ran out, /dev/shm is full. Linux.

Fields of /proc/PID/stat: proc(5). memory.events: the kernel's cgroup-v2 documentation.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

SHM_FULL = 0.95
"""Share of /dev/shm from which it counts as full."""
_MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
_MEETING = "/megatron_sgt/parallel/collectives"
AT_STORE = "waiting at the store"
"""The place of a rank that waits for another's work, whatever the device."""


@dataclass(frozen=True)
class Identity:
    """One process: its host, its boot and PID namespace, its PID and its start time (clock ticks).

    Two processes with the same ``space`` are visible to each other in /proc; PID and start time identify one for good.
    """

    host: str
    space: str
    pid: int
    start: int


def own_identity() -> Identity:
    """This process."""
    pid = os.getpid()
    stat = _stat(pid)
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        space = f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        space = ""
    return Identity(socket.gethostname(), space, pid, 0 if stat is None else stat[1])


def visible(other: Identity, own: Identity) -> bool:
    """Whether ``process_state`` works for ``other`` from here."""
    return bool(own.space) and own.space == other.space


def process_state(process: Identity) -> str | None:
    """The state letter of a visible process (R running, S sleeping, T stopped, D waiting for a device); None: gone.

    A zombie, which has ended and waits for its parent, is gone.
    """
    stat = _stat(process.pid)
    if stat is None or stat[1] != process.start or stat[0] in "ZX":
        return None
    return stat[0]


def _stat(pid: int) -> tuple[str, int] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def oom_kills() -> int:
    """Processes of this control group that the kernel has killed so far because memory ran out; 0 if unknown."""
    try:
        lines = _MEMORY_EVENTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    counts = dict(line.split() for line in lines if len(line.split()) == 2)
    return int(counts.get("oom_kill", 0))


def shm_used() -> float:
    """Used share of /dev/shm, 0 to 1; 0 if there is none."""
    try:
        disk = os.statvfs("/dev/shm")
    except OSError:
        return 0.0
    return 1.0 - disk.f_bavail / disk.f_blocks if disk.f_blocks else 0.0


def whereabouts(thread: int, package: str = "/megatron_sgt/") -> str:
    """Where the Python thread with this identifier is: waiting in a collective, or its innermost line."""
    frame: FrameType | None = sys._current_frames().get(thread)
    if frame is None:
        return "no Python code"
    waiting = ours = ""
    innermost = _shown(frame)
    while frame is not None and not ours:
        file = frame.f_code.co_filename
        if any(part in file for part in _COLLECTIVES):
            waiting = f"waiting in {frame.f_code.co_name}"
        elif _MEETING in file:
            if frame.f_code.co_name == "_wait_at_store":
                waiting = waiting or AT_STORE
        elif package in file:
            ours = _shown(frame)
        frame = frame.f_back
    called = f", called from {ours}" if ours and ours != innermost else ""
    return f"{waiting or f'at {innermost}'}{called}"


def _shown(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
