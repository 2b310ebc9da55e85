"""Finds, together on all ranks, the checkpoint that a run starts from or goes back to, and its place in the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megatron_sgt.checkpoint.forms import read_config
from megatron_sgt.checkpoint.load import verify_together
from megatron_sgt.checkpoint.place import Place, place_of
from megatron_sgt.config import Config
from megatron_sgt.engine.deepspeed_config import check_deepspeed
from megatron_sgt.engine.session import Session
from megatron_sgt.errors import CheckpointError
from megatron_sgt.parallel.collectives import on_rank_zero
from megatron_sgt.preflight import Start, check_disk, find_start
from megatron_sgt.stages.stages import Stage

Look = Callable[[dict[Path, str]], Start]
"""Finds a checkpoint on rank 0, given those that are known to be damaged, and how."""


def find_together(look: Look, session: Session, damaged: dict[Path, str] | None = None) -> Start:
    """The newest whole checkpoint; damaged ones are skipped. Collective.

    If every rank looked, they might see different folders on a network file system.

    Raises:
        CheckpointError: the one that the user named is damaged, or all are.
    """
    damaged = {} if damaged is None else damaged
    while True:
        start = on_rank_zero(partial(look, damaged))
        if start.folder is None:
            return start
        problem = verify_together(start.folder, session.config, session.groups)
        if problem is None:
            return start
        if start.explicit:
            raise CheckpointError(problem)
        damaged[start.folder] = problem


def first_look(session: Session) -> Look:
    """For the start of a process, which checks more than where it begins."""

    def look(damaged: dict[Path, str]) -> Start:
        config = session.config
        precision = config.precision_on(session.groups.device.type)
        check_deepspeed(config, session.groups.world_size, precision)
        check_disk(config, precision)
        return find_start(config, damaged)

    return look


def own_look(session: Session) -> Look:
    """For going back to one of the run's own."""
    own = session.config.checkpoint.model_copy(update={"resume": "auto", "load": None, "start": "resume"})
    return partial(find_start, session.config.model_copy(update={"checkpoint": own}))


def place_together(start: Start, config: Config, stages: Sequence[Stage]) -> Place:
    """Where the checkpoint of ``start`` lies among the stages; without one, the first begins. Collective."""
    folder = start.folder
    if folder is None:
        return Place(stages[0], stages[0])

    def indices() -> tuple[int, int]:
        place = place_of(config, folder, start.saved, read_config(folder).model)
        return place.there.index, place.here.index

    there, here = on_rank_zero(indices)
    return Place(stages[there], stages[here])
