"""Runs the table of rows in processes and keeps what they give, after every row: what breaks loses nothing else.

This process touches no device. A row that raises is named with its error; one that kills its process, poisons the
device for it or hangs costs that process, and the next row gets a fresh one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_parts.crew import Lost, Worker
from gpu_parts.rows import SECTIONS, Row
from megatron_sgt.errors import ConfigError

START = 90.0
"""Seconds that a process has to import everything and to find the device."""
LEAST = 4.0
"""A row is not begun with less time than this."""
COMPILERS = 6
"""Processes at most that compile ahead."""


@dataclass
class Drive:
    """One run of the suite. ``keep`` is called with the result so far."""

    rows: Sequence[Row]
    dry: bool
    deadline: float
    keep: Callable[[dict[str, Any]], None]
    result: dict[str, Any] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    compilers: list[Worker] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """All rows, as far as the time goes.

        Raises:
            ConfigError: there is no GPU and none is imitated.
        """
        try:
            self._begin()
            for row in self.rows:
                self._row(row)
                self.keep(self.result)
        finally:
            for worker in (*self.workers.values(), *self.compilers):
                worker.end()
        return self.result

    def _begin(self) -> None:
        """What is measured; the processes that compile import meanwhile, and wait for the ceilings."""
        self.result |= {"about": {}, "rows": [], **{section: [] for section in SECTIONS}}
        self._worker("kernels").begin([self._job("machine:identity", (), START)])
        if any(row.early for row in self.rows):
            self._worker("training")
        wanted = [row for row in self.rows if row.compiles]
        count = min(len(wanted), 1 if self.dry else COMPILERS, max(1, (os.cpu_count() or 2) // 2))
        self.compilers = [self._new(warm=True) for _ in range(count)]
        try:
            for answer in self._worker("kernels").finish(START):
                self.result["about"] |= answer.get("row", {})
        except Lost as error:
            self._drop("kernels")
            self.result["about"] |= {"device": "unknown", "error": str(error)}
        if self.result["about"].get("device") is None:
            raise ConfigError("gpu_suite measures a GPU, and torch sees none; --dry-run executes it on a CPU")

    def _row(self, row: Row) -> None:
        """Run one row, or say why not."""
        kept_back = sum(min(other.limit, START) for other in self.rows if other.last and other is not row)
        left = self.deadline - time.monotonic() - kept_back
        if left < LEAST:
            self._note(row, None, "skipped: the time is used up")
            return
        if row.early:
            self._worker(row.lane).begin([self._job(row.call, row.arguments, left)])
            return
        began, limit = time.monotonic(), min(row.limit, left)
        early = next((r for r in self.rows if r.early and r.lane == row.lane and not self._noted(r)), None)
        if early is not None:
            self._collect(early, time.monotonic(), min(early.limit, left))
            limit = max(LEAST, min(row.limit, self.deadline - time.monotonic() - kept_back))
            began = time.monotonic()
        self._worker(row.lane).begin([self._job(row.call, row.arguments, limit)])
        self._collect(row, began, limit)
        if row.part == "ceilings" and not row.last:
            self._compile_ahead()

    def _collect(self, row: Row, began: float, limit: float) -> None:
        """The answers of a row that has been begun; results are kept one by one."""
        error, poisoned = None, True
        try:
            for answer in self._worker(row.lane).finish(limit):
                if "row" in answer:
                    self.result[row.section].append(answer["row"])
                    self.keep(self.result)
                else:
                    error, poisoned = answer["error"], answer["poisoned"]
        except Lost as lost:
            error = str(lost)
        if poisoned:
            self._drop(row.lane)
        if error is not None and row.section == "correctness":
            self.result["correctness"].append({"check": row.name, "passed": False, "detail": error})
        self._note(row, time.monotonic() - began, error)

    def _compile_ahead(self) -> None:
        wanted = [row for row in self.rows if row.compiles][: 1 if self.dry else None]
        for number, worker in enumerate(self.compilers):
            worker.begin([self._job(row.call, row.arguments, 60.0) for row in wanted[number :: len(self.compilers)]])
            assert worker.process.stdin is not None
            worker.process.stdin.close()  # it leaves when it is done

    def _note(self, row: Row, seconds: float | None, error: str | None) -> None:
        took = None if seconds is None else round(seconds, 1)
        print(f"{took or 0:7.1f} s  {row.name}{f': {error}' if error else ''}", file=sys.stderr, flush=True)
        self.result["rows"].append({"row": row.name, "part": row.part, "seconds": took, "error": error})

    def _noted(self, row: Row) -> bool:
        return any(note["row"] == row.name for note in self.result["rows"])

    def _job(self, call: str, arguments: Sequence[Any], left: float) -> dict[str, Any]:
        state = {"ceilings": self.result["ceilings"][:1], **trust(self.result["correctness"])}
        return {"call": call, "arguments": arguments, "state": state, "left": left}

    def _new(self, warm: bool = False) -> Worker:
        return Worker({"dry": self.dry, "warm": warm})

    def _worker(self, lane: str) -> Worker:
        if lane not in self.workers:
            self.workers[lane] = self._new()
        return self.workers[lane]

    def _drop(self, lane: str) -> None:
        self.workers.pop(lane).end()


def trust(checks: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The kernels that later rows use: {"backend": of the loop, "attention": of the loop}.

    Custom attention that gives wrong numbers, or other bits each time, is left alone; so are all kernels of the loop
    where they are wrong beside the library's attention too.
    """
    wrong = {check["check"] for check in checks if check["passed"] is False}
    custom = {"custom pass, bf16", "split pass, bf16", "two runs, the same bits"}
    return {
        "backend": "torch" if "library pass, bf16" in wrong else "triton",
        "attention": "library" if wrong & custom else "auto",
    }
