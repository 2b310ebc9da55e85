"""The processes of one start of a run: forked, so that a start takes a second, not ten."""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

from megatron_sgt.launch.rank_info import LOOPBACK, RankInfo, free_port, to_environ
from soak_parts.moments import Armed, watch

RANKS = 2

_context = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start the process that ranks are forked from; it imports torch, Megatron-Core and DeepSpeed once."""
    os.environ["OMP_NUM_THREADS"] = "1"  # the ranks share the cores, and the order of sums must not change
    _context.set_forkserver_preload(["megatron_sgt.engine.run", "soak_parts.ranks"])
    forkserver.ensure_running()


class Ranks:
    """The processes of one start of the run, forked from a server that has imported everything."""

    def __init__(self, config: Path, log: Path) -> None:
        port = free_port()
        self.armed: Armed = _context.Array("i", 2 * RANKS, lock=False)
        self.processes = [
            _context.Process(target=_rank_main, args=(rank, port, str(config), str(log), self.armed))
            for rank in range(RANKS)
        ]
        for process in self.processes:
            process.start()

    def alive(self) -> bool:
        """Whether no rank has left."""
        return all(process.exitcode is None for process in self.processes)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(RANKS):
            if self.processes[rank].exitcode is None:
                os.kill(self.processes[rank].pid or 0, number)

    def freeze(self) -> None:
        """Stop all ranks, and return when they stand still (state "T" of proc(5))."""
        self.send(signal.SIGSTOP)
        for process in self.processes:
            stat = Path(f"/proc/{process.pid}/stat")
            while process.exitcode is None and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "T":
                time.sleep(0.001)

    def first_code(self, patience: float) -> int | None:
        """The exit code of the rank that leaves first, None if none does. The others are killed, as launchers do."""
        deadline = time.monotonic() + patience
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        codes = [process.exitcode for process in self.processes if process.exitcode is not None]
        self.end(0.0)
        return codes[0] if codes else None

    def end(self, patience: float) -> list[int]:
        """Exit codes. What has not left after ``patience`` seconds is killed, as launchers do."""
        deadline = time.monotonic() + patience
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()
        return [process.exitcode or 0 for process in self.processes]


def _rank_main(rank: int, port: int, config: str, log: str, armed: Armed) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(to_environ(RankInfo(rank, RANKS, rank, RANKS, LOOPBACK, port, "torchrun")))
    import torch

    from megatron_sgt.engine.main import main

    torch.set_num_threads(1)
    watch(rank, armed)
    code = main(["--config", config])
    sys.stdout.flush()
    os._exit(code)
