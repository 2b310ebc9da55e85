"""Reads a run directory, skipping what is missing or damaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sgt.config.yaml_io import parse_yaml
from megatron_sgt.errors import ConfigError, DataError
from megatron_sgt.jsonl import read_all, without_void_records
from megatron_sgt.metrics import METRICS_FILE

Record = Mapping[str, Any]
Floats = NDArray[np.float64]

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Restart:
    """A start of the run after its first. lost_steps: steps that had been reported and were taken again."""

    step: int
    time: float | None
    path: str | None
    lost_steps: int


@dataclass(frozen=True)
class RunData:
    """One run. ``records``: the valid ones, in order; ``notes``: what is missing or damaged, in words."""

    name: str
    run_dir: Path
    records: Sequence[Record]
    restarts: Sequence[Restart]
    config: Mapping[str, Any]
    config_text: str | None
    notes: Sequence[str]

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    def series(self, kind: str, key: str) -> tuple[Floats, Floats]:
        """(steps, values) of the records of ``kind`` in which ``key`` is a number; NaN and infinities included."""
        pairs = [
            (record["step"], record[key])
            for record in self.of_kind(kind)
            if isinstance(record.get(key), int | float) and isinstance(record.get("step"), int)
        ]
        table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    @cached_property
    def last_step(self) -> int:
        return max((int(r.get("step") or 0) for r in self.records), default=0)

    @cached_property
    def growth(self) -> list[Record]:
        return self.of_kind("growth")

    @cached_property
    def kept_heads(self) -> dict[int, tuple[int, tuple[int, ...]]]:
        """Selected layer -> (step of its selection, its kept heads)."""
        kept: dict[int, tuple[int, tuple[int, ...]]] = {}
        for event in self.growth:
            for layer, heads in (event.get("kept_heads") or {}).items():
                kept.setdefault(int(layer), (int(event["step"]), tuple(heads)))
        return kept

    def entropy(self) -> tuple[Floats, Floats]:
        """(steps [N], EMA entropies [N, layers, heads]) where they were reported.

        Step 1 is omitted: the EMA starts at 0 and has seen only one step by then.
        """
        found: dict[int, Any] = {}
        for record in self.records:
            if record["kind"] in ("train", "growth") and record.get("ema_entropy") and record["step"] > 1:
                found[int(record["step"])] = record["ema_entropy"]
        shapes = [np.shape(table) for table in found.values()]
        if not found or len(set(shapes)) > 1 or len(shapes[0]) != 2:
            return np.zeros(0), np.zeros((0, 0, 0))
        steps = sorted(found)
        tables = np.array([found[step] for step in steps], dtype=np.float64)
        return np.array(steps, dtype=np.float64), tables

    def tokens_per_step(self) -> int | None:
        for record in self.of_kind("train"):
            samples, tokens = record.get("consumed_samples"), record.get("consumed_tokens")
            if samples and tokens and record.get("global_batch_size"):
                return int(record["global_batch_size"]) * int(tokens) // int(samples)
        return None

    def cumulative(self, key: str) -> tuple[Floats, Floats]:
        """(steps, sum since step 0) of a per-step average that train records carry, such as ``step_time_s``."""
        steps, values = self.series("train", key)
        return steps, np.cumsum(np.diff(steps, prepend=0.0) * values)


def load_run(run_dir: Path, name: str | None = None) -> RunData:
    """Read ``run_dir``.

    Raises:
        DataError: only if it holds no metrics at all.
    """
    path = run_dir / METRICS_FILE
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is no run directory: give the logging.run_dir of a run")
    damaged: list[int] = []
    everything = read_all(path, damaged)
    notes = []
    if damaged:
        some = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        notes.append(f"{len(damaged)} line(s) of {METRICS_FILE} cannot be read and are left out: {some}")
    records = [record for record in without_void_records(everything) if isinstance(record.get("step"), int)]
    if not any(record["kind"] == "train" for record in records):
        notes.append("no training step has been reported yet")
    if not any(record["kind"] == "summary" for record in records):
        notes.append("the run has not ended, or was killed: there is no summary record")
    config_text, config = _read_config(run_dir / CONFIG_FILE, notes)
    return RunData(
        name=name or run_dir.name or str(run_dir),
        run_dir=run_dir,
        records=records,
        restarts=_restarts(everything),
        config=config,
        config_text=config_text,
        notes=notes,
    )


def _read_config(path: Path, notes: list[str]) -> tuple[str | None, Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        config = parse_yaml(text, str(path))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__}): the configuration is not shown")
        return None, {}
    return text, config if isinstance(config, dict) else {}


def _restarts(records: Sequence[Record]) -> list[Restart]:
    starts, reached = [], 0
    for index, record in enumerate(records):
        step = record.get("step")
        if not isinstance(step, int):
            continue
        if record["kind"] == "resume" and index:
            starts.append(Restart(step, record.get("time"), record.get("path"), max(0, reached - step)))
            reached = step
        reached = max(reached, step)
    return starts
