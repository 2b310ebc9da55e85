"""Leases of this process, of another one that is asked for its own, and of hosts that do not exist."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sgt.lease import Lease, inside
from megatron_sgt.lease.holder import Holder
from megatron_sgt.lease.process import Identity, own_identity

TIMEOUT = 1.2
"""Of these leases: ten signs of life in a second."""
_HOLDER = """
import pathlib, sys
from megatron_sgt.errors import LeaseError
from megatron_sgt.lease import Lease
path = pathlib.Path(sys.argv[1])
lease = Lease(path, "a run", "choose another folder", timeout=float(sys.argv[2]))
lease.take()
print("held", flush=True)
for line in sys.stdin:
    try:
        lease.check()
        print("ok", flush=True)
    except LeaseError as error:
        print(error, flush=True)
lease.release()
"""


def lease_of(folder: Path, said: list[str] | None = None, timeout: float = TIMEOUT) -> Lease:
    """A lease of ``folder``; what it says goes to ``said``."""
    say = ([] if said is None else said).append
    return Lease(inside(folder), "a run", "choose another folder", folder, timeout, say)


def elsewhere(**changes: Any) -> Holder:
    """A holder on another host, that no scheduler knows."""
    process = dataclasses.replace(own_identity(), host="node7", space="another boot/pid:[1]", pid=4711, start=5)
    return dataclasses.replace(
        Holder.here("a run", TIMEOUT), **{"process": process, "job": None, "token": "there", **changes}
    )


def write(folder: Path, holder: Holder, age: float = 0.0) -> Path:
    """The lease of ``holder`` in ``folder``, written ``age`` seconds ago."""
    path = inside(folder)
    path.write_bytes(holder.encoded(1))
    os.utime(path, (time.time() - age,) * 2)
    return path


@contextmanager
def held_by_another(path: Path, timeout: float = TIMEOUT) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease at ``path``, until the block ends or ``asked`` is not answered."""
    command = [sys.executable, "-c", _HOLDER, str(path), str(timeout)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def asked(process: subprocess.Popen[str]) -> str:
    """What the lease of ``held_by_another`` says when it is checked: ok, or why it is lost."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def identity_of(pid: int) -> Identity:
    """The process ``pid`` of this machine."""
    start = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return dataclasses.replace(own_identity(), pid=pid, start=start)
