"""Moments within a save at which a rank is held until it is killed.

Every change of a file passes Python's audit events, in whatever thread: a hook of the rank recognizes the moment by
what is opened, renamed or deleted, and names nothing of the code under test. It holds that thread alone, so that
beside an asynchronous save the training goes on.
"""

import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

_HELD = -1
_POLL = 0.0005

Armed = Any
"""Shared integers, two per rank: the number of the awaited moment (0: none, _HELD: reached), events still to pass."""


class Moment(NamedTuple):
    """``matches``: an audit event and its paths; ``leader``: rank 0 alone has it; ``most``: times per save and rank."""

    matches: Callable[[str, list[str]], bool]
    leader: bool
    most: int = 1


def _in_save(path: str) -> bool:
    return "/global_step" in path and ".tmp/" in path and ".removed" not in path


MOMENTS = {
    "killed between the files of a save": Moment(
        lambda event, paths: event == "open" and _in_save(paths[0]) and paths[0].endswith(".pt"), False, most=3
    ),
    "killed before the manifest": Moment(
        lambda event, paths: event == "open" and _in_save(paths[0]) and paths[0].endswith("/manifest.json"), True
    ),
    "killed after the manifest": Moment(
        lambda event, paths: event == "os.rename" and _in_save(f"{paths[0]}/") and not _in_save(paths[1]), True
    ),
    "killed before latest is written": Moment(
        lambda event, paths: event == "os.rename" and paths[1].endswith("/latest"), True
    ),
    "killed in the deletion of an old checkpoint": Moment(
        lambda event, paths: event == "os.remove" and ".removed" in paths[0], True, most=4
    ),
}
_NUMBERS = {name: number for number, name in enumerate(MOMENTS, start=1)}
_EVENTS = {"open", "os.rename", "os.remove"}


def watch(rank: int, armed: Armed) -> None:
    """Hold the thread of this process that comes to the moment for which ``arm`` has been called, until ``disarm``."""
    moments, place = list(MOMENTS.values()), 2 * rank

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in _EVENTS or armed[place] <= 0:
            return
        if moments[armed[place] - 1].matches(event, paths_of(event, args)):
            armed[place + 1] -= 1
            if armed[place + 1] < 0:
                armed[place] = _HELD
                while armed[place] == _HELD:
                    time.sleep(_POLL)

    sys.addaudithook(hook)


def paths_of(event: str, args: tuple[Any, ...]) -> list[str]:
    """The files of an event, whole. A deletion names them by the descriptor of their folder."""
    if event == "os.remove" and args[1] >= 0:
        return [os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), os.fsdecode(args[0]))]
    return [os.fspath(arg) if isinstance(arg, str | os.PathLike) else "" for arg in args[:2]]


def arm(armed: Armed, rank: int, name: str, rng: random.Random) -> int:
    """Await the moment on ``rank``, or on rank 0 where it alone has it; returns the rank."""
    moment = MOMENTS[name]
    rank = 0 if moment.leader else rank
    armed[2 * rank + 1] = rng.randrange(moment.most)
    armed[2 * rank] = _NUMBERS[name]
    return rank


def held(armed: Armed, rank: int) -> bool:
    """Whether the rank has come to its moment."""
    return armed[2 * rank] == _HELD


def disarm(armed: Armed) -> None:
    """Await nothing, and let go of what is held."""
    for place in range(len(armed)):
        armed[place] = 0
