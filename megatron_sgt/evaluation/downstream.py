"""Runs lm-evaluation-harness: on a model in memory, or on whatever answers its requests."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sgt.compat.quiet import quiet_logs
from megatron_sgt.errors import ConfigError, DataError, first_line

Results = dict[str, dict[str, Any]]
"""Task -> its measured values."""


@dataclass(frozen=True)
class Tasks:
    """Which tasks, and how.

    names: of tasks, groups or tags; those of the hub need the network. include_path: folder of further definitions
    (YAML). limit: samples of each task; None: all. named_by, folder_by: the settings or arguments, for messages.
    """

    names: tuple[str, ...]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    named_by: str = "--tasks"
    folder_by: str = "--include-path"


def require_harness(named_by: str = "--tasks") -> None:
    """Check for lm-evaluation-harness, without importing it.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"{named_by} needs lm-evaluation-harness: run 'pip install megatron-sgt[eval]'")


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> Results:
    """What ``lm_eval --model hf`` finds for the export of the same model.

    Args:
        model, tokenizer: of transformers.
        tasks, include_path, num_fewshot, limit: see ``Tasks``.

    Raises:
        ConfigError: the harness is not installed, or knows no such task.
        DataError: a task's data cannot be read, or the model has no tokenizer.
    """
    require_harness()
    if tokenizer is None:
        raise DataError("tasks are text, but the model has no tokenizer; give --tokenizer PATH")
    from lm_eval.models.huggingface import HFLM

    wanted = Tasks(tuple(tasks), include_path, num_fewshot, limit)
    manager = task_manager(wanted)
    with quiet_logs():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    return run_harness(wrapped, wanted, manager)


def run_harness(lm: Any, tasks: Tasks, manager: Any) -> Results:
    """Ask ``lm``, an LM of the harness. The harness seeds the random streams of this process.

    Raises:
        DataError: a task's data cannot be read.
    """
    from lm_eval import simple_evaluate

    with quiet_logs(), _readable(tasks):
        found = simple_evaluate(
            model=lm,
            tasks=list(tasks.names),
            task_manager=manager,
            num_fewshot=tasks.num_fewshot,
            limit=tasks.limit,
            bootstrap_iters=0,
        )
    return {
        name: {
            key.removesuffix(",none"): value
            for key, value in values.items()
            if _is_number(value)
            and key != "sample_len"  # how many questions, which newer harnesses put among the metrics
        }
        for name, values in found["results"].items()
    }


def load_tasks(tasks: Tasks) -> Any:
    """The manager of ``tasks``, once their definitions and data could be read.

    Raises:
        ConfigError, DataError: as ``run_tasks``.
    """
    manager = task_manager(tasks)
    with quiet_logs(), _readable(tasks):
        getattr(manager, "load", manager.load_task_or_group)(list(tasks.names))  # the latter before 0.4.13
    return manager


def task_manager(tasks: Tasks) -> Any:
    """A TaskManager that knows ``tasks``; a ConfigError names those that the harness lacks, or a missing folder."""
    from lm_eval.tasks import TaskManager

    folder = tasks.include_path
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{tasks.folder_by}: {folder} is no folder; give the one with the YAML files of your tasks")
    with quiet_logs():
        unknown, manager = list(tasks.names) or [""], None
        if folder is not None:
            # Searching the harness's own thousands of files is slow and often not needed.
            manager = TaskManager(include_path=str(folder), include_defaults=False)
            unknown = [task for task in unknown if task not in manager.all_tasks]
        if unknown:
            manager = TaskManager(include_path=None if folder is None else str(folder))
            unknown = [task for task in unknown if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"{tasks.named_by}: unknown: {', '.join(map(repr, unknown))}; 'lm_eval ls tasks' lists what the harness "
            f"has, {tasks.folder_by} adds a folder of your own"
        )
    return manager


@contextlib.contextmanager
def _readable(tasks: Tasks) -> Iterator[None]:
    """Inside, data that cannot be read is one line, and the harness draws no bars."""
    from lm_eval.api import task as module
    from tqdm import tqdm

    before = module.tqdm
    module.tqdm = partial(tqdm, disable=True)
    try:
        yield
    except (OSError, ConnectionError, ValueError) as error:
        raise DataError(
            f"the data of {', '.join(tasks.names)} cannot be read: {first_line(error)}; tasks of the hub need the "
            "network"
        ) from error
    finally:
        module.tqdm = before


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
