"""What the operating system knows: memory ran out, /dev/shm is full, where a thread is. Linux.

memory.events: the kernel's cgroup-v2 documentation.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType

SHM_FULL = 0.95
"""Share of /dev/shm from which it counts as full."""
_MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "/megatron/core/pipeline_parallel/p2p_communication.py")
_MEETING = "/megatron_sgt/parallel/collectives"
AT_STORE = "waiting at the store"
"""The place of a rank that waits for another's work, whatever the device."""


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
