"""The time of a step through a pipeline of several chunks per stage: its passes one after another. Pure.

Pass k of a stage begins when pass k - 1 of that stage has ended and what it needs is there: a forward pass the output
of the chunk before, a backward pass the gradient of the chunk behind. The order is Megatron-Core's (``in_flight``),
messages cost nothing, and a backward pass takes twice as long as a forward pass.

No short formula says how chunks of several lengths keep each other waiting: not the largest stage, which is what 1F1B
takes, and not the largest chunk of each row of P chunks either. A step is the same again and again after a while, so
that one of more than ``SETTLED`` rounds of P micro-batches is continued at the pace of the last two: within 1 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from megatron_sgt.planning.in_flight import passes

SETTLED = 8
"""Rounds of P micro-batches that are simulated."""
_Order = tuple[tuple[int, int, int], ...]


def interleaved_time(chunks: Sequence[float], size: int, micro_batches: int) -> float:
    """The time of a step, in thirds of the unit of ``chunks``, so that integers are added without rounding.

    Args:
        chunks: forward and backward pass of every chunk for one micro-batch, in the order of the model.
        size: stages. micro_batches: a multiple of it.
    """
    rounds = micro_batches // size
    if rounds <= SETTLED:
        return _simulated(chunks, size, rounds)
    last = _simulated(chunks, size, SETTLED)
    return last + (rounds - SETTLED) * (last - _simulated(chunks, size, SETTLED - 2)) / 2


def _simulated(chunks: Sequence[float], size: int, rounds: int) -> float:
    takes, times = [*chunks, *(2 * one for one in chunks)], [chunks[0] - chunks[0]]
    for before, needed, which in _order(size, len(chunks) // size, rounds):
        begins, other = times[before], times[needed]
        times.append((begins if begins > other else other) + takes[which])
    return max(times)


@lru_cache(maxsize=128)
def _order(size: int, virtual_size: int, rounds: int) -> _Order:
    """All passes so that each comes after those that it waits for, whose places (from 1 on; 0: none) it names.

    (the pass of the same stage before it, the pass that sends what it needs, the chunk; backward: plus all chunks)
    """
    parts = size * virtual_size
    queues = [list(passes(size, virtual_size, stage, rounds * size)) for stage in range(size)]
    done = [[0] * (2 * parts) for _ in range(rounds * size)]  # micro-batch, pass: its place
    taken, counts, latest, order = [0] * size, [0] * (2 * parts), [0] * size, []
    while any(at < len(queue) for at, queue in zip(taken, queues, strict=True)):
        for stage, queue in enumerate(queues):
            while taken[stage] < len(queue):
                forward, chunk = queue[taken[stage]]
                part = chunk * size + stage
                which = part if forward else parts + part
                row = done[counts[which]]
                needs = which - 1 if forward else which + 1
                if which == 2 * parts - 1:
                    needs = parts - 1
                needed = 0 if which == 0 else row[needs]
                if which and not needed:
                    break
                order.append((latest[stage], needed, which))
                latest[stage] = row[which] = len(order)
                counts[which] += 1
                taken[stage] += 1
    return tuple(order)
