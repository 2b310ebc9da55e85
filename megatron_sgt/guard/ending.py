"""How the process of a rank ends: a user's mistake is reported by one rank, and no rank is left waiting."""

from __future__ import annotations

import functools
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from megatron_sgt.errors import ExitCode, SGTError, of_full_disk
from megatron_sgt.launch.environment import RankInfo, discover

GRACE = 10.0
"""Seconds in which rank 0 has reported an error that every rank has met. Then its launcher ends the others."""


@functools.cache
def place() -> RankInfo:
    """This process's place in the run.

    Raises:
        ConfigError: the launcher's variables make no sense.
    """
    return discover()


def run_rank(work: Callable[[], int | None]) -> int:
    """Do ``work``; return the exit code of this process, or exit at once where peers may be waiting.

    0 (or what ``work`` returns): done. An SGTError is a user's mistake: its message on stderr and its own
    code. 130: Ctrl-C. Any other exception is a bug: traceback and code 1.
    """
    try:
        return work() or 0
    except SGTError as error:
        _report(error, _known_place())
        return _leave(error.exit_code)
    except OSError as error:
        full = of_full_disk(error)
        if full is None:
            return _report_bug()
        _report(full, _known_place())
        return _leave(full.exit_code)
    except KeyboardInterrupt:
        info = _known_place()
        if info is None or info.rank == 0:
            print("interrupted: the steps since the newest checkpoint are lost", file=sys.stderr)
        return _leave(ExitCode.INTERRUPTED)
    except Exception:
        return _report_bug()


def _report_bug() -> int:
    info = _known_place()
    rank = "" if info is None or info.world_size == 1 else f"[rank {info.rank}] "
    print(f"{rank}{traceback.format_exc()}", file=sys.stderr, flush=True)
    return _leave(ExitCode.CRASH)


def _known_place() -> RankInfo | None:
    """This process's place, None where that is what went wrong."""
    try:
        return place()
    except SGTError:
        return None


def _report(error: SGTError, info: RankInfo | None) -> None:
    """Print the error, unless another rank does.

    Launchers end all ranks when one has left. So a rank that prints nothing, or is not the first to print, waits: the
    one that prints must not be killed before it has.
    """
    ours = "" if info is None or info.rank == 0 else f" (rank {info.rank} on {socket.gethostname()})"
    store = None if info is None or info.world_size == 1 else _store()
    if store is not None and not _first(store):
        time.sleep(GRACE)
        return
    if store is None and info is not None:
        time.sleep(patience(info))
    print(f"error: {error}{ours}", file=sys.stderr, flush=True)


def patience(info: RankInfo) -> float:
    """Seconds that a rank waits for others to report first, before the ranks are connected.

    Most errors are met by all ranks, and rank 0 reports them. What one rank alone has met (a file that is
    missing on its node, a GPU that is not there) it reports later.
    """
    if info.rank == 0:
        return 0.0
    on_first_node = info.rank == info.local_rank
    return (GRACE if on_first_node else 3 * GRACE) + 0.5 * info.local_rank


def _store() -> Any:
    dist = getattr(sys.modules.get("torch"), "distributed", None)
    if dist is None or not dist.is_initialized():
        return None
    return dist.distributed_c10d._get_default_store()


def _first(store: Any) -> bool:
    try:
        return store.add("sgt/error_reported", 1) == 1
    except RuntimeError:  # the store's host is gone, and has reported the cause
        return False


def _leave(code: int) -> int:
    """Exit at once where peers may be waiting in a collective: their launcher ends them when this process is gone."""
    if _store() is not None:
        sys.stdout.flush()
        os._exit(code)
    return code
