"""Cut a row of layers into the chunks of a pipeline so that its fullest stage is as small as it can be. Pure integers.

With t_p, the cost of all chunks of stage p, a step of M micro-batches takes M · max t_p + (Σ t_p - max t_p) / V (1F1B:
(M - 1) · max t_p + Σ t_p). Σ t_p is the same for all cuts, so the one with the smallest max t_p is the fastest.

One chunk per stage: exact, by bisection of the limit under which the layers find room.
Several: stage p holds chunks p, p + P, ... Stages pass their chunks in step with each other, so that none may be much
longer than the others (``longest_chunk``). No fast exact way is known. From several starts one layer at a time
goes from one chunk to another (the layers between them move on by one chunk), until no such move makes the largest
stage smaller; from the best cuts found, the search then goes on through cuts that are not better, within a fixed number
of moves. It ends at once where ``lower_bound`` is met: then no cut is better.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from heapq import heapify, heappop, heappush, nsmallest
from itertools import accumulate

Costs = tuple[int, ...]
Ends = tuple[int, ...]
"""The first layer after every chunk."""
_Worst = tuple[int, int]
_LOOKED_AT, _BEST = 2**16, 64
"""Moves that are looked at beyond the first cuts that no move improves, and how many of each cut are followed up."""


@lru_cache(maxsize=256)
def best_cut(costs: Costs, output: int, then: Costs, size: int, virtual_size: int) -> tuple[int, ...]:
    """The number of layers of every chunk, at least one each, in the order of the model.

    Of equal cuts it is one whose largest stage by ``then`` is smallest; of those the one whose chunks are most even
    (the smallest sum of their squares), and then the one with longer chunks later: early stages hold the activations of
    most micro-batches. With several chunks these are followed as far as single moves lead.

    Args:
        costs: of every layer. output: of the output layer, on the last chunk. then: other costs of every layer.
        size: stages. virtual_size: chunks of each.
    """
    if virtual_size == 1:
        return _exact(costs, output, then, size)
    return _search(costs, output, then, size, virtual_size)


def longest_chunk(layers: int, size: int, virtual_size: int) -> int:
    """The most layers of a chunk: as many as is left for one per stage, of several one more than an even share."""
    return layers - size + 1 if virtual_size == 1 else -(-layers // (size * virtual_size)) + 1


def stage_costs(costs: Sequence[int], output: int, counts: Sequence[int], size: int) -> list[int]:
    """The cost of every stage of a cut."""
    sums, first = [0] * size, 0
    for chunk, number in enumerate(counts):
        sums[chunk % size] += sum(costs[first : first + number])
        first += number
    sums[-1] += output
    return sums


def lower_bound(costs: Costs, output: int, size: int, virtual_size: int) -> int:
    """No cut has a smaller largest stage.

    Some stage has the mean; the dearest layer is on a stage of V layers; the last stage has the last layer; and under a
    limit a stage has at most so many of the cheapest layers as fit, which together must be all layers.
    """
    cheapest = list(accumulate(sorted(costs), initial=0))
    ends_with = [costs[-1] + one for one in accumulate(sorted(costs[:-1]), initial=output)]

    def enough(limit: int) -> bool:
        last = bisect_right(ends_with, limit)
        return last >= virtual_size and last + (size - 1) * (bisect_right(cheapest, limit) - 1) >= len(costs)

    mean, whole = -(-(sum(costs) + output) // size), sum(costs) + output
    return max(mean, max(costs) + cheapest[virtual_size - 1], _smallest(enough, whole))


def _exact(costs: Costs, output: int, then: Costs, size: int) -> Ends:
    rows = [costs]
    limits = [_smallest(lambda limit: _fits(rows, [limit], output, size), sum(costs) + output)]
    rows.append(then)
    limits.append(_smallest(lambda limit: _fits(rows, [*limits, limit], output, size), sum(then) + output))

    @cache
    def best(stage: int, first: int) -> tuple[int, Ends] | None:
        """(sum of squares, counts) of the stages from ``stage`` on, which hold the layers from ``first`` on."""
        room = _room(limits, output, last=stage == size - 1)
        found = []
        for end in range(first + 1, len(costs) - (size - 1 - stage) + 1):
            room = [left - row[end - 1] for left, row in zip(room, rows, strict=True)]
            if min(room) < 0:
                break
            if stage < size - 1:
                if rest := best(stage + 1, end):
                    found.append(((end - first) ** 2 + rest[0], (end - first, *rest[1])))
            elif end == len(costs):
                found.append(((end - first) ** 2, (end - first,)))
        return min(found, default=None)

    cut = best(0, 0)
    assert cut is not None
    return cut[1]


def _fits(rows: Sequence[Costs], limits: Sequence[int], output: int, size: int) -> bool:
    """Whether the layers find room if every stage, from the last one on, takes as many as it can."""
    end = len(rows[0])
    for stage in reversed(range(size)):
        room, first = _room(limits, output, last=stage == size - 1), end
        while first > stage and all(left >= row[first - 1] for left, row in zip(room, rows, strict=False)):
            first -= 1
            room = [left - row[first] for left, row in zip(room, rows, strict=False)]
        if first == end or min(room) < 0:
            return False
        end = first
    return end == 0


def _room(limits: Sequence[int], output: int, last: bool) -> list[int]:
    return [limit - last * output for limit in limits]


def _smallest(possible: Callable[[int], bool], high: int) -> int:
    """The smallest number up to ``high``, which is possible, from which on all are."""
    low = 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if possible(middle) else (middle + 1, high)
    return low


def _search(costs: Costs, output: int, then: Costs, size: int, virtual_size: int) -> tuple[int, ...]:
    bound, heap = lower_bound(costs, output, size, virtual_size), []
    for start in _starts(costs, output, size, virtual_size):
        heap.append(_lowered(start, costs, output, size))
        if heap[-1][0][0] == bound:
            break
    (largest, number), ends = min(heap)
    seen = {ends for _, ends in heap}
    heapify(heap)
    for _ in range(_LOOKED_AT // (size * virtual_size) ** 2):
        if largest == bound or not heap:
            break
        for key, other in _around(heappop(heap)[1], costs, output, size):
            if other not in seen:
                seen.add(other)
                heappush(heap, (key, other))
                (largest, number), ends = min(((largest, number), ends), (key, other))
    return _counts(_evened(ends, costs, largest, output, then, size))


def _around(ends: Ends, costs: Costs, output: int, size: int) -> list[tuple[_Worst, Ends]]:
    """The best cuts that are one move away."""
    loads = stage_costs(costs, output, _counts(ends), size)
    moves = nsmallest(_BEST, ((_worst(loads), move) for move in _moves(ends, [costs], [loads], size)))
    return [(key, _moved(ends, *move)) for key, move in moves]


def _counts(ends: Sequence[int]) -> tuple[int, ...]:
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


def _starts(costs: Costs, output: int, size: int, virtual_size: int) -> Iterator[Ends]:
    """The end of every chunk: even ones, with the layers that are left over here or there, and chunks of equal cost."""
    parts, layers = size * virtual_size, len(costs)
    each, rest = divmod(layers, parts)
    for first in dict.fromkeys((0, parts - rest, *range(0, parts - rest, size))):
        yield tuple(accumulate(each + (first <= part < first + rest) for part in range(parts)))
    sums, whole = list(accumulate(costs)), sum(costs) + output
    before, ends, longest = 0, [], longest_chunk(layers, size, virtual_size)
    for part in range(1, parts + 1):
        end = sum(parts * one <= part * whole for one in sums) if part < parts else layers
        latest = min(before + longest, layers - (parts - part))
        before = min(max(end, before + 1, layers - longest * (parts - part)), latest)
        ends.append(before)
    yield tuple(ends)


def _lowered(ends: Ends, costs: Costs, output: int, size: int) -> tuple[_Worst, Ends]:
    """The cut from ``ends`` on whose largest stage no move makes smaller, nor fewer stages as large."""
    while True:
        loads = stage_costs(costs, output, _counts(ends), size)
        key = _worst(loads)
        move = next((move for move in _moves(ends, [costs], [loads], size) if _worst(loads) < key), None)
        if move is None:
            return key, ends
        ends = _moved(ends, *move)


def _evened(ends: Ends, costs: Costs, limit: int, output: int, then: Costs, size: int) -> Ends:
    """The cut from ``ends`` on, with no larger stage than ``limit``, that is best by ``then`` and most even."""
    while True:
        counts = _counts(ends)
        loads, others = (stage_costs(each, output, counts, size) for each in (costs, then))
        key = _worst(others)
        for start, chunk in _moves(ends, [costs, then], [loads, others], size):
            if max(loads) > limit or (rival := _worst(others)) > key:
                continue
            gain = counts[start] - counts[chunk]  # 1: the two change places, so that the longer one is later
            if rival < key or gain > 1 or (gain == 1 and start < chunk):
                ends = _moved(ends, start, chunk)
                break
        else:
            return ends


def _worst(loads: list[int]) -> _Worst:
    """Smaller is better: the largest stage, and how many are as large."""
    largest = max(loads)
    return largest, loads.count(largest)


def _moves(ends: Ends, rows: list[Costs], loads: list[list[int]], size: int) -> Iterator[tuple[int, int]]:
    """All (chunk with several layers, chunk that gets one of them); ``loads`` are meanwhile those after the move."""
    parts, before, counts = len(ends), [load.copy() for load in loads], _counts(ends)
    longest = longest_chunk(ends[-1], size, parts // size)
    for start in range(parts):
        if counts[start] == 1:
            continue
        for step in (1, -1):
            for load, old in zip(loads, before, strict=True):
                load[:] = old
            for chunk in range(start + step, parts if step == 1 else -1, step):
                layer = ends[chunk - 1] - 1 if step == 1 else ends[chunk]
                for load, costs in zip(loads, rows, strict=True):
                    load[(chunk - step) % size] -= costs[layer]
                    load[chunk % size] += costs[layer]
                if counts[chunk] < longest:
                    yield start, chunk


def _moved(ends: Ends, start: int, chunk: int) -> Ends:
    """The cut after a layer went from chunk ``start`` to ``chunk``: every border between them is passed by one."""
    step = -1 if start < chunk else 1
    borders = range(min(start, chunk), max(start, chunk))
    return tuple(end + step * (border in borders) for border, end in enumerate(ends))
