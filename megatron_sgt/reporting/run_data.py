"""Reads a run directory, skipping what is missing or damaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
class StageSpan:
    """Steps ``first`` + 1 to ``last`` of one model. ``grow``: the record of its beginning; None for the first.

    ``layers``: how many it has; None where nothing tells.
    """

    first: int
    last: int
    layers: int | None
    grow: Record | None

    def holds(self, step: int) -> bool:
        """Whether the model trained ``step``; step 0 counts to the first."""
        return self.first < step <= self.last or (self.grow is None and step == 0)


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

    def names(self, kind: str, field: str) -> list[str]:
        """What the records of ``kind`` have values of in their mapping ``field``, in the order of appearance."""
        return list(dict.fromkeys(name for record in self.of_kind(kind) for name in record.get(field) or {}))

    def series_of(self, kind: str, field: str, name: str, key: str) -> tuple[Floats, Floats]:
        """As ``series``, of ``name`` in the mapping ``field``."""
        records = [
            {"kind": kind, "step": record.get("step"), **record[field][name]}
            for record in self.of_kind(kind)
            if isinstance((record.get(field) or {}).get(name), Mapping)
        ]
        return replace(self, records=records).series(kind, key)

    @cached_property
    def last_step(self) -> int:
        return max((int(r.get("step") or 0) for r in self.records), default=0)

    @cached_property
    def growth(self) -> list[Record]:
        return self.of_kind("growth")

    @cached_property
    def grows(self) -> list[Record]:
        """How the model became deeper or wider, once for each stage: what a restart repeats adds nothing."""
        found: dict[int, dict[str, Any]] = {}
        for record in self.of_kind("grow"):
            if all(isinstance(record.get(name), list) for name in ("layers", "heirs", "loop_depth")):
                known = {name: value for name, value in record.items() if value is not None}
                found[record["step"]] = {**found.get(record["step"], {}), **known}
        return [found[step] for step in sorted(found)]

    @cached_property
    def stages(self) -> list[StageSpan]:
        """The models of the run in order; one where it did not grow."""
        begun = [None, *self.grows]
        firsts = [0, *(grow["step"] for grow in self.grows)]
        lasts = [*firsts[1:], max(self.last_step, firsts[-1])]
        depths = [event["loop_depth"] for event in self.growth if event.get("loop_depth")]
        first = 1 + max(self.grows[0]["layers"]) if self.grows else max(map(len, depths), default=None)
        layers = [first, *(len(grow["layers"]) for grow in self.grows)]
        return [StageSpan(*values) for values in zip(firsts, lasts, layers, begun, strict=True)]

    @cached_property
    def kept_heads(self) -> dict[int, tuple[int, tuple[int, ...]]]:
        """Selected layer of the last model -> (step of its selection, its kept heads)."""
        kept: dict[int, tuple[int, tuple[int, ...]]] = {}
        for stage in self.stages:
            if stage.grow is not None:
                heirs = stage.grow["heirs"]
                kept = {heirs[layer]: found for layer, found in kept.items() if layer < len(heirs)}
            for event in (event for event in self.growth if stage.holds(event["step"])):
                for layer, heads in (event.get("kept_heads") or {}).items():
                    kept.setdefault(int(layer), (int(event["step"]), tuple(heads)))
        return kept

    def measured_entropy(self) -> tuple[list[int], list[Floats]]:
        """(steps, EMA entropies [layers, heads] of the model at that step) where they were reported.

        Step 1 is omitted: the EMA starts at 0 and has seen only one step by then.
        """
        found: dict[int, Any] = {}
        for record in self.records:
            if record["kind"] in ("train", "growth") and record.get("ema_entropy") and record["step"] > 1:
                found[int(record["step"])] = record["ema_entropy"]
        if any(len(np.shape(table)) != 2 for table in found.values()):
            return [], []
        steps = sorted(found)
        return steps, [np.array(found[step], dtype=np.float64) for step in steps]

    def entropy(self) -> tuple[Floats, Floats]:
        """(steps [N], EMA entropies [N, layers, heads] of the last model): each layer has those of its ancestors.

        NaN for heads that were not there yet.
        """
        steps, tables = self.measured_entropy()
        tables = [self._of_last_model(step, table) for step, table in zip(steps, tables, strict=True)]
        if not tables or len({table.shape for table in tables}) > 1:
            return np.zeros(0), np.zeros((0, 0, 0))
        return np.array(steps, dtype=np.float64), np.array(tables)

    def _of_last_model(self, step: int, table: Floats) -> Floats:
        for grow in (grow for grow in self.grows if grow["step"] >= step):
            if max(grow["layers"]) >= len(table):
                return np.zeros((0, 0))
            before, after = (grow.get(f"sizes_{when}") or {} for when in ("before", "after"))
            heads = after.get("num_attention_heads") or table.shape[1]
            grown = np.full((len(grow["layers"]), heads), np.nan)
            if _per_group(before) == _per_group(after):  # else heads have got other numbers
                grown[:, : table.shape[1]] = table[grow["layers"]]
            table = grown
        return table

    @cached_property
    def phases(self) -> list[Record]:
        """The phases of the run that have begun, once each."""
        found = {record["number"]: record for record in self.of_kind("phase")}
        return [found[number] for number in sorted(found)]

    def flops_per_token(self) -> tuple[Floats, Floats]:
        """(steps, model FLOPs per token) of the train records that tell both, each with the batch size of its step."""
        pairs = []
        for record in self.of_kind("train"):
            samples, tokens = record.get("consumed_samples"), record.get("consumed_tokens")
            size, flops = record.get("global_batch_size"), record.get("model_flops_per_step")
            if samples and tokens and size and isinstance(flops, int | float):
                pairs.append((record["step"], flops / (int(size) * int(tokens) // int(samples))))
        table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def cumulative(self, key: str) -> tuple[Floats, Floats]:
        """(steps, sum since step 0) of a per-step average that train records carry, such as ``step_time_s``."""
        steps, values = self.series("train", key)
        return steps, np.cumsum(np.diff(steps, prepend=0.0) * values)


def _per_group(sizes: Mapping[str, int]) -> float:
    return sizes.get("num_attention_heads", 1) / sizes.get("num_query_groups", 1)


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
