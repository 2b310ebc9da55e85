"""Which process somebody is, and whether it is alive: from /proc. Linux.

Fields of /proc/PID/stat: proc(5).
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


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
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])
