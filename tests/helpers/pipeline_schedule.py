"""The definition of a pipeline step's time: every stage does its passes in order, each as soon as it can."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sgt.planning.in_flight import passes


def simulated_time(chunks: Sequence[float], size: int, micro_batches: int) -> float:
    """Seconds of a step in which a micro-batch takes ``chunks`` in both passes, a third of it forward.

    Messages are free. ``chunks``: in the order of the model; chunk v of stage p is number v · size + p.
    """
    virtual = len(chunks) // size
    left = [list(passes(size, virtual, stage, micro_batches))[::-1] for stage in range(size)]
    ended: dict[tuple[bool, int, int], float] = {}  # (forward, chunk, micro-batch)
    count = {(forward, chunk): 0 for forward in (True, False) for chunk in range(len(chunks))}
    free = [0.0] * size
    while any(left):
        before = len(ended)
        for stage, queue in enumerate(left):
            while queue:
                forward, chunk = queue[-1][0], queue[-1][1] * size + stage
                one = count[forward, chunk]
                needed = (True, chunk - 1, one) if forward else (False, chunk + 1, one)
                if not forward and chunk == len(chunks) - 1:
                    needed = (True, chunk, one)
                if (forward, chunk) != (True, 0) and needed not in ended:
                    break
                free[stage] = max(free[stage], ended.get(needed, 0.0)) + chunks[chunk] * (1 if forward else 2) / 3
                ended[forward, chunk, one] = free[stage]
                count[forward, chunk] += 1
                queue.pop()
        assert len(ended) > before, "stages wait for each other"
    return max(free)
