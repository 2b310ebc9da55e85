"""Runs lm-evaluation-harness on a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sgt.compat.quiet import quiet_logs
from megatron_sgt.errors import ConfigError, DataError, first_line


def require_harness() -> None:
    """Check for lm-evaluation-harness.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--tasks needs lm-evaluation-harness ({error}): pip install megatron-sgt[eval]") from error


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Task -> its measured values, as ``lm_eval --model hf`` finds them for the export of the same model.

    Args:
        model, tokenizer: of transformers.
        tasks: names of tasks, groups or tags; those of the hub need the network.
        include_path: folder of further task definitions (YAML).
        limit: samples of each task; None: all.

    Raises:
        ConfigError: the harness is not installed, or knows no such task.
        DataError: a task's data cannot be read, or the model has no tokenizer.
    """
    require_harness()
    if tokenizer is None:
        raise DataError("tasks are text, but the model has no tokenizer; give --tokenizer PATH")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with quiet_logs():
        manager = _manager(tasks, include_path)
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            found = simple_evaluate(
                model=wrapped,
                tasks=list(tasks),
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=0,
            )
        except (OSError, ConnectionError, ValueError) as error:
            raise DataError(
                f"the data of {', '.join(tasks)} cannot be read: {first_line(error)}; tasks of the hub need the network"
            ) from error
    return {
        name: {key.removesuffix(",none"): value for key, value in values.items() if _is_number(value)}
        for name, values in found["results"].items()
    }


def _manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """A TaskManager that knows ``tasks``; a ConfigError names those that the harness lacks."""
    from lm_eval.tasks import TaskManager

    unknown, manager = list(tasks) or [""], None
    if include_path is not None:
        # Searching the harness's own thousands of files is slow and often not needed.
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        unknown = [task for task in unknown if task not in manager.all_tasks]
    if unknown:
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        unknown = [task for task in unknown if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"--tasks: unknown: {', '.join(map(repr, unknown))}; 'lm_eval ls tasks' lists what the harness has, "
            "--include-path adds a folder of your own"
        )
    return manager


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
