"""Runs a function on n gloo ranks.

The first call starts a fork server that imports torch, Megatron-Core and DeepSpeed once (a few seconds); from
then on every call forks its ranks from it in a quarter of a second. Each case therefore has fresh processes:
no process group, random stream or library global of one layout survives into the next.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from megatron_sgt.launch.rank_info import LOOPBACK, RankInfo, to_environ

ROOT = Path(__file__).parents[2]
PRELOADED = ["megatron_sgt.engine.run", "megatron_sgt.export.parity", "matplotlib.figure", "tests.helpers.warm"]
"""What many forks import, in this order; what is not installed is left out."""
SHARED_MEMORY = "shared_memory"
"""Name of the tests' own backend."""
LOG_TAIL = 4000
"""Characters of each rank's output that an error shows."""
GRACE = 2.0
"""Seconds for the other ranks to report, after one has failed."""

_context = multiprocessing.get_context("forkserver")


class RankError(AssertionError):
    """A rank died without an exception, or did not finish in time."""


class _OnRanks(Exception):
    """Tracebacks and output of the ranks, shown as the cause of what is raised in the test."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass
class _Rank:
    process: Any
    pipe: connection.Connection
    log: Path
    outcome: tuple[str, Any, str] | None = None

    def report(self, index: int) -> str:
        """What a person needs of this rank: its traceback or state, and the end of its output."""
        code = self.process.exitcode
        state = self.outcome[2] if self.outcome else "running" if code is None else f"exit code {code}"
        output = self.log.read_text(errors="replace")[-LOG_TAIL:] if self.log.exists() else ""
        return f"--- rank {index}: {state}\n{output}".rstrip()


def run_on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120.0,
    backend: str = SHARED_MEMORY,
) -> list:
    """The results by rank of ``function(info, *args)`` on ``world_size`` ranks with torch.distributed up.

    backend: SHARED_MEMORY (see ``shared_memory.py``), or "gloo", which takes more of a core
    of a tiny model: for tests of what gloo itself does, and for a share of the golden layouts.

    ``function`` is found by its module and name, arguments and results are pickled. An exception on a rank is
    raised here, with the tracebacks of all ranks as its cause. After ``timeout`` seconds every rank's stack
    is dumped into the RankError, and the ranks are killed.
    """
    payload = pickle.dumps((function, args))
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_start(Path(folder), rank, world_size, backend, payload) for rank in range(world_size)]
        try:
            _collect(ranks, time.monotonic() + timeout)
            _raise_failure(ranks, timeout)
            for rank in ranks:  # nobody leaves before all have finished: a peer may still be reading from it
                rank.pipe.send_bytes(b"")
            return [rank.outcome[1] for rank in ranks if rank.outcome]
        finally:
            _end(ranks, GRACE if sys.exc_info()[0] is None else 0.0)


@contextmanager
def running_on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> Iterator[list[int]]:
    """Process ids of ranks that do what ``run_on_ranks`` would let them do; killed at the end of the context."""
    payload = pickle.dumps((function, args))
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_start(Path(folder), rank, world_size, "gloo", payload) for rank in range(world_size)]
        try:
            yield [rank.process.pid for rank in ranks]
        except AssertionError as error:
            raise error from _OnRanks("\n".join(rank.report(n) for n, rank in enumerate(ranks)))
        finally:
            _end(ranks, 0.0)


def _end(ranks: list[_Rank], patience: float) -> None:
    """Kill what has not ended by itself in time."""
    for rank in ranks:
        rank.process.join(patience)
        if rank.process.exitcode is None:
            rank.process.kill()
            rank.process.join()
        rank.process.close()
        rank.pipe.close()


def start_server() -> None:
    """Start the fork server in an environment in which it finds the project, installed or not."""
    _context.set_forkserver_preload(PRELOADED)
    ours = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    before = dict(os.environ)
    os.environ.update(ours)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _start(folder: Path, rank: int, world_size: int, backend: str, payload: bytes) -> _Rank:
    pipe, theirs = _context.Pipe()
    log = folder / f"rank{rank}.log"
    store = str(folder / "store")  # ranks meet in a file: no port that another program could take first
    where = (rank, world_size, store, backend)
    process = _context.Process(target=_rank_main, args=(where, str(log), theirs, payload))
    process.start()
    theirs.close()
    return _Rank(process, pipe, log)


def _collect(ranks: list[_Rank], deadline: float) -> None:
    """Receive outcomes until all are there, one has failed (and the others had time to tell), or time is up."""
    waiting = {rank.pipe: rank for rank in ranks}
    while waiting:
        ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            return
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                rank.outcome = pickle.loads(pipe.recv_bytes())
            except EOFError:
                rank.process.join(GRACE)
                rank.outcome = ("died", None, f"died with exit code {rank.process.exitcode}")
            if rank.outcome[0] != "done":
                deadline = min(deadline, time.monotonic() + GRACE)


def _raise_failure(ranks: list[_Rank], timeout: float) -> None:
    """Raise the first failure, if there is one."""
    failed = [rank for rank in ranks if rank.outcome and rank.outcome[0] != "done"]
    silent = [rank for rank in ranks if rank.outcome is None]
    if not failed and not silent:
        return
    for rank in silent:
        os.kill(rank.process.pid, signal.SIGUSR1)  # dumps its stacks into its log
    time.sleep(0.5 if silent else 0.0)
    reports = _OnRanks("\n".join(rank.report(index) for index, rank in enumerate(ranks)))
    raised = [rank.outcome[1] for rank in failed if rank.outcome and rank.outcome[1] is not None]
    if raised:
        raise min(raised, key=_is_consequence) from reports
    numbers = [index for index, rank in enumerate(ranks) if rank in (failed or silent)]
    what = "died" if failed else f"not finished after {timeout:g} s"
    raise RankError(f"rank {numbers} of {len(ranks)} {what}") from reports


def _is_consequence(error: BaseException) -> bool:
    """Whether an error merely says that a peer has gone."""
    return "Connection" in str(error) or "connection" in str(error)


def _rank_main(where: tuple[int, int, str, str], log: str, pipe: connection.Connection, payload: bytes) -> None:
    """A forked rank: run, report, wait until all are done, leave without tearing anything down."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    try:
        outcome: tuple[str, Any, str] = ("done", _call(*where, payload), "done")
        message = pickle.dumps(outcome)
    except BaseException as error:
        message = _describe(error)
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(message)
    connection.wait([pipe])
    os._exit(0)


def _call(rank: int, world_size: int, store: str, backend: str, payload: bytes) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    info = RankInfo(rank, world_size, rank, world_size, LOOPBACK, 1, "torchrun")
    os.environ.update(to_environ(info))
    if backend == SHARED_MEMORY:
        from tests.helpers.shared_memory import register

        register(Path(store).parent)
    dist.init_process_group(backend, store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    function, args = pickle.loads(payload)
    return function(info, *args)


def _describe(error: BaseException) -> bytes:
    text = traceback.format_exc()
    try:
        message = pickle.dumps(("failed", error, text))
        pickle.loads(message)
    except Exception:
        message = pickle.dumps(("failed", RankError(f"{type(error).__name__}: {error}"), text))
    return message
