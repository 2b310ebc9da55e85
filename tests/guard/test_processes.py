"""What is read of the machine: kills for memory, shared memory, where a thread is."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_sgt.guard import processes


@pytest.mark.parametrize(
    ("text", "kills"), [("low 0\noom 3\noom_kill 2\noom_group_kill 0\n", 2), ("low 0\n", 0), (None, 0)]
)
def test_oom_kills(text: str | None, kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "memory.events"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(processes, "_MEMORY_EVENTS", file)
    assert processes.oom_kills() == kills


def test_shm() -> None:
    assert 0.0 <= processes.shm_used() <= 1.0


def test_whereabouts() -> None:
    """Busy in a line of its own, or waiting in a collective: the files on the stack distinguish them."""
    source = "def {0}():\n    ready.set()\n    go.wait(20)\n"
    stuck = "def busy():\n    {0}()\n"
    for file, expected in (
        ("/x/torch/distributed/distributed_c10d.py", "waiting in all_reduce, called from busy (step.py:2)"),
        (
            "/x/megatron/core/pipeline_parallel/p2p_communication.py",
            "waiting in all_reduce, called from busy (step.py:2)",
        ),
        ("/x/megatron_sgt/parallel/collectives.py", "waiting at the store, called from busy (step.py:2)"),
        ("/x/megatron_sgt/parallel/collectives/largest.py", "at wait (threading.py:"),
        ("/x/numpy/core.py", "at wait (threading.py:"),
    ):
        ready, go = threading.Event(), threading.Event()
        names = {"ready": ready, "go": go}
        called = "_wait_at_store" if file.endswith("parallel/collectives.py") else "all_reduce"
        exec(compile(source.format(called), file, "exec"), names)
        exec(compile(stuck.format(called), "/x/megatron_sgt/engine/step.py", "exec"), names)
        thread = threading.Thread(target=names["busy"])  # type: ignore[arg-type]
        thread.start()
        assert ready.wait(10) and thread.ident is not None
        time.sleep(0.05)
        said = processes.whereabouts(thread.ident)
        go.set()
        thread.join()
        assert said.startswith(expected) and "busy (step.py:2)" in said, (said, sys.version)
    assert processes.whereabouts(-1) == "no Python code"
