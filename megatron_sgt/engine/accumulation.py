"""Another number of micro-batches per optimizer step, in an engine that trains."""

from __future__ import annotations

import deepspeed


def accumulate(engine: deepspeed.DeepSpeedEngine, micro_batches: int) -> None:
    """Let ``engine``, between two optimizer steps, accumulate so many micro-batches in each step from now on.

    ``set_train_batch_size`` alone is not enough: the end of a step is where the number of all micro-batches so far is a
    multiple of the new number, which the past ones need not be.
    """
    if micro_batches == engine.gradient_accumulation_steps():
        return
    engine.set_train_batch_size(engine.train_micro_batch_size_per_gpu() * micro_batches * engine.dp_world_size)
    engine.micro_steps = 0
