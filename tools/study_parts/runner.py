"""Trains the runs of a study as processes, some at a time, in slices that add up.

A slice that is over stops its runs with SIGTERM; they save and leave with ExitCode.SAVED, and the next slice resumes
them. Finished runs are not started again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_sgt.errors import ExitCode, SGTError
from study_parts.results import outcome_of

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """One run of the study; ``command`` starts or resumes it."""

    preset: str
    seed: int
    run_dir: Path
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """As people read it."""
        return f"{self.preset}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        """Whether the run has ended with a validation of its last step."""
        return outcome_of(self.run_dir, self.preset, self.seed) is not None


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float


def run_jobs(jobs: Sequence[Job], at_once: int, budget_seconds: float | None, tell: Callable[[str], None]) -> list[Job]:
    """Run what is not finished; returns the jobs that are still not when the budget is used up.

    Raises:
        SGTError: a run fails; the others are stopped first, and have saved.
    """
    waiting = [job for job in jobs if not job.finished]
    deadline = None if budget_seconds is None else time.monotonic() + budget_seconds
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once and not _over(deadline):
                running.append(_start(waiting.pop(0)))
            if _over(deadline):
                break
            time.sleep(POLL_SECONDS)
            running = [one for one in running if not _has_ended(one, tell)]
    finally:
        _stop(running, tell)
    return [job for job in jobs if not job.finished]


def _over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _start(job: Job) -> _Running:
    job.run_dir.mkdir(parents=True, exist_ok=True)
    log = open(job.run_dir / "console.log", "ab")  # noqa: SIM115 - closed when the run has ended
    process = subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT)
    return _Running(job, process, log, time.monotonic())


def _has_ended(one: _Running, tell: Callable[[str], None]) -> bool:
    code = one.process.poll()
    if code is None:
        return False
    one.log.close()
    if code not in (ExitCode.DONE, ExitCode.SAVED):
        log = one.job.run_dir / "console.log"
        tail = log.read_text(encoding="utf-8", errors="replace")[-1500:]
        raise SGTError(f"{one.job.name} ended with code {code}; the end of {log}:\n{tail}")
    state = "done" if code == ExitCode.DONE else "saved, goes on in the next slice"
    tell(f"{one.job.name}: {state} after {time.monotonic() - one.started:.0f} s")
    return True


def _stop(running: Sequence[_Running], tell: Callable[[str], None]) -> None:
    """Ask every run to save and stop, and wait for it."""
    for one in running:
        if one.process.poll() is None:
            os.kill(one.process.pid, signal.SIGTERM)
    for one in running:
        code = one.process.wait()
        one.log.close()
        tell(f"{one.job.name}: stopped with code {code}")
