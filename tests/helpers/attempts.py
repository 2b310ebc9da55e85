"""Several ranks of pretrain_sgt.py without any launcher: nobody ends the others when one has gone.

The ranks are forks (see ``commands.run_script``) with the variables that torchrun would export.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from megatron_sgt.jsonl import read_metrics
from megatron_sgt.launch.rank_info import LOOPBACK, RankInfo, free_port, to_environ
from megatron_sgt.metrics import METRICS_FILE
from tests.helpers.commands import ROOT, Finished, _script_main
from tests.helpers.ranks import start_server

_context = multiprocessing.get_context("forkserver")


def become(info: RankInfo, inject: Callable[[int], None] | None) -> None:
    """What a rank does before the script: take its place, and what the test wants to go wrong."""
    import torch

    torch.set_num_threads(1)
    os.environ.update(to_environ(info))
    if inject is not None:
        inject(info.rank)


class Attempt:
    """One start of a run on ``world_size`` ranks."""

    def __init__(
        self,
        folder: Path,
        arguments: list[str],
        world_size: int,
        inject: Callable[[int], None] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """cwd: ``folder``, where the output goes, by default."""
        start_server()
        self.folder, port = folder, free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.processes = []
        for rank in range(world_size):
            info = RankInfo(rank, world_size, rank, world_size, LOOPBACK, port, "torchrun")
            out, err = (str(folder / f"{name}{rank}") for name in ("out", "err"))
            before = partial(become, info, inject)
            process = _context.Process(
                target=_script_main,
                args=(str(ROOT / "pretrain_sgt.py"), arguments, str(cwd or folder), out, err, before),
            )
            process.start()
            self.processes.append(process)

    def wait_for_step(self, run_dir: Path, step: int, timeout: float = 60.0) -> None:
        """Return once ``step`` is reported; AssertionError if a rank ends before."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert all(process.is_alive() for process in self.processes), self.finished()
            metrics = run_dir / METRICS_FILE
            if metrics.exists() and any(
                record["kind"] == "train" and record["step"] >= step for record in read_metrics(metrics)
            ):
                return
            time.sleep(0.1)
        raise AssertionError(f"no step {step} in {timeout} s: {self.finished()}")

    def signal(self, rank: int, number: signal.Signals) -> float:
        """Send a signal to a rank; returns the time."""
        os.kill(self.processes[rank].pid, number)
        return time.monotonic()

    def wait(self, ranks: list[int], timeout: float) -> list[int | None]:
        """Exit codes of ``ranks``; None for one that has not ended in time."""
        deadline = time.monotonic() + timeout
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return [self.processes[rank].exitcode for rank in ranks]

    def finished(self) -> list[Finished]:
        """Exit codes (-1: still there) and output of all ranks so far."""
        return [
            Finished(
                -1 if process.exitcode is None else process.exitcode,
                (self.folder / f"out{rank}").read_text(),
                (self.folder / f"err{rank}").read_text(),
            )
            for rank, process in enumerate(self.processes)
        ]

    def end(self) -> None:
        """Leave no process behind."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


@contextmanager
def attempt(
    folder: Path, config: Path, world_size: int, inject: Callable[[int], None] | None = None
) -> Iterator[Attempt]:
    """An Attempt that is over, in one way or another, when the body is left."""
    started = Attempt(folder, ["--config", str(config)], world_size, inject)
    try:
        yield started
    finally:
        started.end()
