"""The faults: which there are, how often they come, and how each strikes."""

import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from megatron_sgt.checkpoint import layout
from megatron_sgt.errors import ExitCode
from soak_parts.aim import Aim, Left
from soak_parts.disk import DAMAGES, filled
from soak_parts.lease import killed_holder, second_start, stopped_holder
from soak_parts.moments import MOMENTS, disarm
from soak_parts.ranks import RANKS
from soak_parts.running import PATIENCE, Lost, Running
from soak_parts.workload import INTERVAL

Strike = Callable[[Running, Aim], Left]


class Fault(NamedTuple):
    """``weight``: how often it comes, relative to the others."""

    weight: int
    strike: Strike


def _kill(run: Running, aim: Aim, all_ranks: bool) -> Left:
    time.sleep(aim.fraction * run.step_s)
    run.ranks.send(signal.SIGKILL, *([] if all_ranks else [aim.rank]))
    return Left.DYING


def _kill_in_save(run: Running, aim: Aim, all_ranks: bool, late: bool = False) -> Left:
    if not run.wait(run.is_saving, poll=0.0005):
        return Left.GONE
    if late:
        run.ranks.send(signal.SIGSTOP, aim.rank)
    time.sleep(aim.fraction * run.save_seconds())
    run.ranks.send(signal.SIGKILL, *([] if all_ranks else [aim.rank]))
    return Left.DYING


def _kill_at(run: Running, aim: Aim, moment: str) -> Left:
    """Hold a thread of a rank at the moment for up to two saves, then kill the rank, or the other one, or all."""
    rank = run.hold_at(moment, aim.rank, aim.rng)
    if rank is None:
        return Left.GONE
    time.sleep(aim.fraction * 2 * INTERVAL * run.step_s)
    run.ranks.send(signal.SIGKILL, *aim.rng.choice(([rank], [1 - rank], range(RANKS))))
    disarm(run.ranks.armed)
    return Left.DYING


def _signal(run: Running, aim: Aim, number: signal.Signals) -> Left:
    run.ranks.send(number, aim.rank)
    codes = run.ranks.end(PATIENCE)
    if set(codes) not in ({ExitCode.SAVED}, {ExitCode.DONE}):
        raise Lost(f"after {number.name} the ranks ended with {codes}:\n{run.said()}")
    return Left.DYING


def _full_disk(run: Running, aim: Aim) -> Left:
    """Less than a checkpoint of room for the length of two saves."""
    whole = [run.root / tag for tag in layout.finished_tags(run.root)]
    size = sum(layout.file_sizes(whole[-1]).values()) if whole else 0
    with filled(run.root.parent, size // 2):
        return Left.ALIVE if run.wait_steps(2 * INTERVAL) else Left.DYING


def _slow_rank(run: Running, aim: Aim) -> Left:
    run.ranks.send(signal.SIGSTOP, aim.rank)
    time.sleep(1.5 * aim.fraction)
    run.ranks.send(signal.SIGCONT, aim.rank)
    return Left.ALIVE


FAULTS = {
    "kill one rank": Fault(3, partial(_kill, all_ranks=False)),
    "kill all ranks": Fault(3, partial(_kill, all_ranks=True)),
    "kill one rank inside a save": Fault(4, partial(_kill_in_save, all_ranks=False)),
    "kill all ranks inside a save": Fault(4, partial(_kill_in_save, all_ranks=True)),
    "kill all, one of them late in a save": Fault(4, partial(_kill_in_save, all_ranks=True, late=True)),
    **{name: Fault(2, partial(_kill_at, moment=name)) for name in MOMENTS},
    "SIGTERM to one rank": Fault(2, partial(_signal, number=signal.SIGTERM)),
    "SIGUSR1 to one rank": Fault(2, partial(_signal, number=signal.SIGUSR1)),
    # The damage itself comes after the death (run.py).
    **{name: Fault(2, partial(_kill, all_ranks=True)) for name in DAMAGES},
    "second start": Fault(2, second_start),
    "killed holder": Fault(2, killed_holder),
    "stopped holder": Fault(2, stopped_holder),
    "full disk": Fault(2, _full_disk),
    "slow rank": Fault(2, _slow_rank),
}


def drawn(kinds: Iterable[str], rng: random.Random) -> Iterator[str]:
    """Kinds without end, as often as the table says."""
    names = list(kinds)
    while True:
        yield rng.choices(names, [FAULTS[name].weight for name in names])[0]
