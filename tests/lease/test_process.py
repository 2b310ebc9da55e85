"""What is read of processes: alive, stopped, ended but not collected, another one with the same number."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from pathlib import Path

from megatron_sgt.lease import process as processes
from megatron_sgt.lease.process import Identity, own_identity, process_state, visible


def identity_of(process: subprocess.Popen[bytes]) -> Identity:
    stat = processes._stat(process.pid)
    assert stat is not None
    return dataclasses.replace(own_identity(), pid=process.pid, start=stat[1])


def test_a_process_through_its_life() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        identity = identity_of(process)
        assert process_state(identity) in ("S", "R", "D")
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while process_state(identity) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process_state(identity) == "T"
        os.kill(process.pid, signal.SIGKILL)
        while process_state(identity) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process_state(identity) is None, "ended, though nobody has collected it yet"
        assert Path(f"/proc/{process.pid}").exists()
    assert process_state(identity) is None


def test_another_process_with_the_same_number_is_not_taken_for_it() -> None:
    own = own_identity()
    assert process_state(own) is not None
    assert process_state(dataclasses.replace(own, start=own.start - 1)) is None


def test_who_can_be_seen() -> None:
    own = own_identity()
    assert visible(dataclasses.replace(own, pid=1), own)
    assert not visible(dataclasses.replace(own, space="another host"), own)
    assert not visible(dataclasses.replace(own, space=""), dataclasses.replace(own, space=""))
