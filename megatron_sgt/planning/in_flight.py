"""The passes of a pipeline stage in their order, and how many micro-batches are in flight meanwhile. Pure.

Megatron-Core's schedules, P stages of V chunks, M micro-batches, on stage p:

    1F1B          P-p-1 forward passes, then one forward and one backward pass in turn, then the other backward ones:
                  min(M, P-p) micro-batches at once
    interleaved   2(P-p-1) + (V-1)P forward passes of chunks, then in turn as above. P micro-batches pass a chunk
                  before the next chunk's turn; backward passes take the chunks the other way round.
                  2(P-p-1) + (V-1)P + 1 chunks at once, at most M·V
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple


class Pass(NamedTuple):
    """One chunk's forward or backward pass for one micro-batch."""

    forward: bool
    chunk: int


def passes(size: int, virtual_size: int, stage: int, micro_batches: int) -> Iterator[Pass]:
    """Every pass of ``stage`` in a step, in order."""
    total = micro_batches * virtual_size
    ahead = size - stage - 1
    if virtual_size > 1:
        ahead = 2 * ahead + (virtual_size - 1) * size
    ahead = min(ahead, total)
    for number in range(total + ahead):
        if number < total:
            yield Pass(True, _chunk(number, size, virtual_size))
        if number >= ahead:
            yield Pass(False, virtual_size - 1 - _chunk(number - ahead, size, virtual_size))


def _chunk(number: int, size: int, virtual_size: int) -> int:
    return number % (size * virtual_size) // size


@lru_cache(maxsize=1024)
def moments(size: int, virtual_size: int, stage: int, micro_batches: int) -> tuple[tuple[tuple[int, ...], int], ...]:
    """(micro-batches in flight by chunk, the chunk whose turn it is) at the beginning of each backward pass.

    Each such moment once. The first 3P micro-batches meet all that a longer step meets.
    """
    found: dict[tuple[tuple[int, ...], int], None] = {}
    flying = [0] * virtual_size
    for forward, chunk in passes(size, virtual_size, stage, min(micro_batches, 3 * size)):
        if not forward:
            found[tuple(flying), chunk] = None
        flying[chunk] += 1 if forward else -1
    return tuple(found)


def most_in_flight(size: int, virtual_size: int, stage: int, micro_batches: int) -> int:
    """The most chunks of ``stage`` that wait for their backward pass at once."""
    return max(sum(flying) for flying, _ in moments(size, virtual_size, stage, micro_batches))
