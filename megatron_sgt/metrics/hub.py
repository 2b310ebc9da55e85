"""The hub that hands every report to all writers of rank 0, and the writers that a configuration asks for."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sgt.config.run import LoggingConfig
from megatron_sgt.jsonl import JsonlWriter, encode
from megatron_sgt.metrics.console import ConsoleWriter
from megatron_sgt.metrics.records import RECORDS
from megatron_sgt.metrics.writers import TensorBoardWriter, WandbWriter, Writer

METRICS_FILE = "metrics.jsonl"


class MetricsHub:
    """Hands every report to all writers; with no writers (every rank but 0) it does nothing.

    A writer whose destination fails (OSError: full disk, closed pipe, lost network) never stops training:
    the failure is reported once on stderr, the writer is tried again with the next record, and ``close`` says how many
    were lost.

    Args:
        may_write: called before each report; raises where another run writes into the folder by now.
    """

    def __init__(self, writers: Sequence[Writer] = (), may_write: Callable[[], None] = lambda: None) -> None:
        self._may_write = may_write
        self._writers = tuple(writers)
        self._lost: Counter[int] = Counter()
        self._reasons: dict[int, str] = {}

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Report ``record``; ``time`` (seconds since the epoch) is added.

        Raises:
            LeaseError: ``may_write`` has; no writer was called.
            ValueError: its kind is unknown; or on every rank alike, a hook's record cannot be written.
        """
        if kind not in RECORDS:
            raise ValueError(f"kind must be one of {tuple(RECORDS)}, got {kind!r}")
        stamped = {"time": time.time(), **record}
        if kind == "hook":
            _check_hook_record(stamped)
        if self._writers:
            self._may_write()
        self._each(lambda writer: writer.write(kind, stamped))

    def advance(self, step: int) -> None:
        self._each(lambda writer: writer.advance(step))

    def close(self) -> None:
        """Close every writer, also after one of them failed; say what was lost."""
        self._each(lambda writer: writer.close())
        for index, count in self._lost.items():
            name = type(self._writers[index]).__name__
            print(f"warning: {name} lost {count} reports ({self._reasons[index]})", file=sys.stderr)
        self._lost.clear()

    def _each(self, act: Callable[[Writer], None]) -> None:
        for index, writer in enumerate(self._writers):
            try:
                act(writer)
            except OSError as error:
                if index not in self._reasons:
                    name = type(writer).__name__
                    print(f"warning: {name} cannot write ({error}); training goes on", file=sys.stderr)
                self._reasons[index] = str(error)
                self._lost[index] += 1


def _check_hook_record(record: Mapping[str, Any]) -> None:
    """Refuse on all ranks what would fail in a writer of rank 0, for which the others would wait."""
    if missing := {"hook", "values"} - record.keys():
        raise ValueError(f"a hook's record lacks {', '.join(sorted(missing))}")
    try:
        encode("hook", record)
    except TypeError as error:
        raise ValueError(f"the record of hook {record['hook']!r} is not JSON-able: {error}") from error


def build_hub(
    logging: LoggingConfig,
    train_iters: int,
    resolved: Mapping[str, Any],
    may_write: Callable[[], None] = lambda: None,
) -> MetricsHub:
    """The hub of rank 0: the console and run_dir/metrics.jsonl always, TensorBoard and W&B when asked.

    resolved: the whole configuration, shown by W&B. Other ranks use MetricsHub().

    Raises:
        ConfigError: a package that is asked for is missing.
    """
    run_dir = Path(logging.run_dir)
    writers: list[Writer] = []
    if logging.tensorboard:
        writers.append(TensorBoardWriter(run_dir / "tensorboard"))
    if logging.wandb_project is not None:
        writers.append(WandbWriter(logging.wandb_project, logging.wandb_name, run_dir, resolved))
    writers.append(JsonlWriter(run_dir / METRICS_FILE))
    writers.append(ConsoleWriter(logging.style, logging.progress_bar, train_iters))
    return MetricsHub(writers, may_write)
