"""Which checkpoints a run writes, and which of them are there at its end (checkpoint.keep_last, keep_every). Pure."""

from __future__ import annotations

from collections.abc import Collection

from megatron_sgt.config import Config
from megatron_sgt.config.base import count


def saved_steps(config: Config, ends: Collection[int] = ()) -> list[int]:
    """The steps after which the run saves. ``ends``: the last ones of the stages of a growing model but the last."""
    interval, last = config.checkpoint.save_interval, config.train.train_iters
    return sorted({*ends, *(range(interval, last + 1, interval) if interval else (last,))})


def milestones(config: Config) -> int:
    """How many checkpoints of the run are never deleted, as their steps are multiples of keep_every."""
    every = config.milestone_interval
    return sum(step % every == 0 for step in saved_steps(config)) if every else 0


def kept_steps(config: Config, ends: Collection[int] = ()) -> list[int]:
    """Those of ``saved_steps`` whose checkpoints are there at the end."""
    steps, newest, every = saved_steps(config, ends), config.checkpoint.keep_last, config.milestone_interval
    last = set(steps[-newest:])
    return [step for step in steps if step in last or step in ends or (every and step % every == 0)]


def kept_text(config: Config, ends: int = 0) -> str:
    """What is kept, in words. ``ends``: how many stages of a growing model another one follows."""
    newest, every, number = config.checkpoint.keep_last, config.milestone_interval, milestones(config)
    parts = [f"{newest} kept" if newest else "all kept"]
    if newest and number:
        parts.append(f"{count(number, 'milestone')} (every {every:,} steps)")
    if ends:
        parts.append(f"{count(ends, 'save')} between stages")
    return " and ".join(parts) if len(parts) < 3 else f"{parts[0]}, {parts[1]} and {parts[2]}"
