"""The processes that run rows: asked one row at a time, killed with their children when one does not answer."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


class Lost(Exception):
    """A worker gave no answer; the message says why."""


class Worker:
    """One process of gpu_parts.worker. ``values``: of its Machine."""

    def __init__(self, values: dict[str, Any]) -> None:
        paths = [str(ROOT / "tools/bench"), str(ROOT / "tools"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if values["dry"]:
            environment["TRITON_INTERPRET"] = "1"  # read when Triton is imported
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpu_parts.worker", json.dumps(values)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,  # its children die with it
        )
        self.answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def begin(self, jobs: Sequence[dict[str, Any]]) -> None:
        """Hand jobs over without waiting for them."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # told when the answer is asked for
            self.process.stdin.write("".join(json.dumps(job) + "\n" for job in jobs))
            self.process.stdin.flush()

    def finish(self, limit: float) -> Iterator[dict[str, Any]]:
        """Answers to the oldest job, "done" last.

        Raises:
            Lost: the crew takes longer than ``limit`` seconds or dies.
        """
        until = time.monotonic() + limit
        while True:
            try:
                line = self.answers.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise Lost(f"killed after {limit:.0f} s") from None
            if line is None:
                raise Lost(f"its process ended with code {self.process.wait()}")
            answer = json.loads(line)
            yield answer
            if "done" in answer:
                return

    def end(self) -> None:
        """Kill the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
