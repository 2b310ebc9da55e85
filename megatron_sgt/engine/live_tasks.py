"""Puts the tasks of evaluation.tasks together with the model of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sgt.config import Config
from megatron_sgt.data.tokenizer import Tokenizer
from megatron_sgt.evaluation.downstream import Results, Tasks, load_tasks, run_harness
from megatron_sgt.evaluation.live_model import LiveModel
from megatron_sgt.parallel.groups import ParallelGroups

RunTasks = Callable[[LiveModel], Results]


def open_tasks(config: Config, tokenizer: Tokenizer | None) -> RunTasks:
    """Read the definitions and the data of the tasks, on rank 0.

    Raises:
        ConfigError: the harness knows no such task.
        DataError: a task's data cannot be read; the tokenizer has no token that ends a text.
    """
    chosen, section = config.evaluation, config.data.tokenizer
    assert tokenizer is not None and section is not None, "config/rules.py refuses tasks without one"
    _ = tokenizer.eod
    wanted = Tasks(
        chosen.tasks,
        None if chosen.include_path is None else Path(chosen.include_path),
        chosen.num_fewshot,
        chosen.limit,
        "evaluation.tasks",
        "evaluation.include_path",
    )
    manager = load_tasks(wanted)

    def run(live: LiveModel) -> Results:
        from megatron_sgt.evaluation.harness_model import HarnessModel  # imports the harness

        return run_harness(HarnessModel(live, tokenizer, section.add_bos), wanted, manager)

    return run


def run_no_tasks(live: LiveModel) -> Results:
    """What ranks other than the first have instead: nobody calls it."""
    raise AssertionError("rank 0 alone runs the harness")


def live_model(
    config: Config, engine: Any, groups: ParallelGroups, tokenizer: Tokenizer | None, alive: Callable[[], None]
) -> LiveModel:
    """The model of ``engine``, as the tasks ask it: train.micro_batch_size texts at a time on each rank."""
    assert tokenizer is not None and config.model.vocab_size is not None
    return LiveModel(
        engine,
        groups,
        config.train.micro_batch_size,
        config.model.vocab_size,
        config.model.seq_length,
        tokenizer.decode,
        tokenizer.eod,
        alive,
    )
