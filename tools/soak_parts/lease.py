"""Faults of the lease, by which one run at a time writes into its folders: a second start, and holders that vanish."""

import hashlib
import random
import signal
import time
from pathlib import Path

from megatron_sgt.errors import ExitCode
from megatron_sgt.metrics import METRICS_FILE
from soak_parts.aim import Aim, Left
from soak_parts.moments import MOMENTS, disarm
from soak_parts.ranks import RANKS, Ranks
from soak_parts.running import PATIENCE, Lost, Running
from soak_parts.workload import INTERVAL, LEASE_TIMEOUT

AT_ONCE = 0.8 * LEASE_TIMEOUT
"""Seconds in which a start is at its first record, unless it waits for the lease to become stale."""


def second_start(run: Running, aim: Aim) -> Left:
    """The same command while the run is alive: refused within seconds, and the run goes on unharmed."""
    log, begun = run.log.with_suffix(".second.log"), time.monotonic()
    second = Ranks(run.config, log)
    code = second.first_code(PATIENCE)
    seconds = time.monotonic() - begun
    if not run.ranks.alive():
        return Left.GONE
    if code != ExitCode.CHECKPOINT or seconds > PATIENCE / 4 or "is held by" not in log.read_text(encoding="utf-8"):
        raise Lost(
            f"a second start ended after {seconds:.1f} s with {code}:\n{log.read_text(encoding='utf-8')[-3000:]}"
        )
    return Left.ALIVE if run.wait_steps(2 * INTERVAL) else Left.GONE


def killed_holder(run: Running, aim: Aim) -> Left:
    """A lease whose holder is no more is taken over without waiting."""
    time.sleep(aim.fraction * run.step_s)
    run.ranks.send(signal.SIGKILL)
    run.next_start = _at_once
    return Left.DYING


def _at_once(run: Running) -> None:
    begun, known = time.time(), len(run.records())
    run.start_ranks()
    if run.wait(lambda: len(run.records()) > known):
        seconds = run.records()[known]["time"] - begun
        if seconds > AT_ONCE:
            raise Lost(f"after its holder was killed, the run went on after {seconds:.1f} s only:\n{run.said()}")


def stopped_holder(run: Running, aim: Aim) -> Left:
    """A holder that stands still for longer than its lease allows loses it, and ends when it goes on.

    Both it and its successor may stand still at a moment of the same save, just after they have looked whether the run
    is theirs.
    """
    if not _freeze(run, aim.rank, aim.rng):
        return Left.GONE
    run.stopped, stopped_at = run.ranks, time.time()
    run.next_start = lambda run: _over_a_stopped_one(run, stopped_at, aim.rng)
    return Left.DYING


def _over_a_stopped_one(run: Running, stopped_at: float, rng: random.Random) -> None:
    time.sleep(LEASE_TIMEOUT)
    run.start_ranks()
    if not _freeze(run, rng.randrange(RANKS), rng):  # what changes now, the former one has changed
        return
    former, run.stopped = run.stopped, None
    assert former is not None
    before, known = _contents(run), len(run.records())
    former.send(signal.SIGCONT)
    code = former.first_code(PATIENCE)
    after, new = _contents(run), run.records()[known:]
    run.ranks.send(signal.SIGCONT)
    changed = sorted(str(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    # Stopped after it has looked whether the run is its own, and before it writes, it finishes one record.
    if len(new) > 1 or any(record["time"] > stopped_at for record in new):
        changed.append(f"{run.run_dir / METRICS_FILE}: {new}")
    if code != ExitCode.CHECKPOINT or changed:
        raise Lost(f"a stopped holder went on to exit code {code}, and changed {changed}:\n{run.said()}")


def _freeze(run: Running, rank: int, rng: random.Random) -> bool:
    """Let the run stand still after some steps, or at a moment of its next save; False when it has ended before."""
    moment = rng.choice(("", "", *MOMENTS))
    there = run.hold_at(moment, rank, rng) is not None if moment else run.wait_steps(rng.randint(1, 2 * INTERVAL))
    time.sleep(rng.random() * run.step_s)
    run.ranks.freeze()
    disarm(run.ranks.armed)
    return there


def _contents(run: Running) -> dict[Path, tuple[int, str]]:
    """Checkpoints and settings, without what is being deleted: by whom does not matter.

    Why ranks have ended stands in a folder of their own beside these.
    """
    files = [path for path in run.root.rglob("*") if path.is_file() and ".removed." not in path.parent.name]
    files += [path for path in run.run_dir.iterdir() if path.is_file() and path.name != METRICS_FILE]
    return {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}
