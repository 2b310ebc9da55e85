"""Growth that repeats the decisions of a recorded run instead of taking its own (``growth.replay``).

The record is that run's ``metrics.jsonl``, or a JSON list of growth events. Layers, kept heads, depths and steps are
taken from it; gates fade by this run's ``decay_type`` over its ``window_size``, which must be the recorded one.

A model that became deeper or wider meanwhile is repeated with the same stages: the schedule of each stage takes what
was decided up to its end, in the numbers of its own layers. Stages are told apart by their layers and heads; where
neither changes, neither do the numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from megatron_sgt.config.base import count
from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import CheckpointError, ConfigError, DataError
from megatron_sgt.growth.inherit import Inheritance, refuse_moved
from megatron_sgt.growth.plan import GrowthEvent, LayerPlan, LoopPlan
from megatron_sgt.growth.schedule import Schedule, Stage
from megatron_sgt.growth.sgt import Action, Grown, SGTSchedule
from megatron_sgt.jsonl import read_metrics, without_void_records

_FINGERPRINT = "replayed_events"
GREW = "grow"
"""Kind of the record, and action of the event, of a model that became deeper or wider."""
_Parsed = TypeVar("_Parsed")


@dataclass(frozen=True)
class RecordedEvent:
    """One decision of the recorded run; ``kept_heads``: of ``layer`` alone, empty for "fixed"."""

    step: int
    action: Action
    layer: int | None
    kept_heads: tuple[int, ...]


@dataclass(frozen=True)
class RecordedGrowth:
    """The model of the recorded run became another one after ``step``.

    ``layers``: the old layer of each new one. ``heirs``: where looping layers went on. ``heads``: before and after;
    None where the record does not say.
    """

    step: int
    operator: str
    layers: tuple[int, ...]
    heirs: Mapping[int, int]
    heads: tuple[int | None, int | None]


class ReplaySchedule(SGTSchedule):
    """The paper's schedule with decisions that are read from ``config.replay``.

    Raises:
        ConfigError: the file cannot be read, or its events do not fit this model and configuration.
    """

    def __init__(self, config: GrowthConfig, num_layers: int, num_heads: int) -> None:
        super().__init__(config, num_layers, num_heads)
        assert config.replay is not None
        self._recorded = read_events(Path(config.replay), config, num_layers, num_heads)

    @property
    def probes(self) -> frozenset[str]:
        """Nothing is decided from entropies; they may still be watched."""
        return super().probes if self.config.entropy_after_fixed else frozenset()

    def decides_at(self, step: int) -> bool:
        return any(event.step == step for event in self._recorded)

    def _decide(self, step: int) -> GrowthEvent:
        event = next(event for event in self._recorded if event.step == step)
        if event.layer is None:
            self._phase = "fixed"
            return self.event(step, event.action)
        if event.action == "increase_depth":
            self._grown[event.layer].loops += 1
        else:
            self._grown[event.layer] = Grown(1, event.kept_heads, step)
        self._window_end = step + self.config.window_size
        self._phase = "selecting"
        return self.event(step, event.action, event.layer)

    def final_plan(self, together: bool = False) -> LoopPlan:
        grown = {event.layer: event.kept_heads for event in self._recorded if event.layer is not None}
        again = Counter(event.layer for event in self._recorded)
        last = ((n, LayerPlan(again[n], kept)) for n, kept in grown.items() if kept)
        return LoopPlan(self.num_layers, tuple(last))

    def worst_case(self, last_step: int, together: bool = False) -> Iterator[Stage]:
        yield Stage(0, "vanilla", LoopPlan.empty(self.num_layers))
        trial = ReplaySchedule(self.config, self.num_layers, self.num_heads)
        for step in sorted(event.step for event in self._recorded if event.step <= last_step):
            (event,) = trial.after_step(step)
            yield Stage(step, "fixed" if event.layer is None else "window", trial.plan)

    def advice(self, train_iters: int) -> Iterator[str]:
        yield from ()

    def describe(self, added: str) -> str:
        layers = count(len(self.final_plan().layers), "layer")
        return f"repeats the decisions of {self.config.replay}: {layers}, {added} once fixed"

    def inherit(self, older: Schedule, grown: Inheritance) -> list[str]:
        """Selected layers become their heirs, as in the recorded run.

        Raises:
            ConfigError: a kept head would get another number.
        """
        assert isinstance(older, ReplaySchedule)
        self._take_over(older, grown)
        return []

    def check_growth(self, step: int, grown: Inheritance) -> None:
        """See Schedule: what was decided is known.

        Raises:
            ConfigError: as ``inherit``.
        """
        refuse_moved((head for event in self._recorded if event.step <= step for head in event.kept_heads), grown)

    def adopt(self, plan: LoopPlan) -> None:
        raise ConfigError("growth.replay: repeats growth from its beginning, but the given model has grown already")

    def _fingerprint(self) -> str:
        return hashlib.sha256(repr(self._recorded).encode()).hexdigest()

    def progress(self) -> dict[str, Any]:
        """See Schedule; the record's fingerprint is kept too."""
        return {**super().progress(), _FINGERPRINT: self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            CheckpointError: also when the record is another one than the checkpoint's.
        """
        super().load_state_dict(state)
        if state.get(_FINGERPRINT) != self._fingerprint():
            raise CheckpointError(
                f"growth.replay {self.config.replay} holds other events than when the checkpoint was saved"
            )


def recorded_growths(path: Path) -> list[RecordedGrowth]:
    """How the model of the recorded run became deeper or wider, in order.

    Raises:
        ConfigError: the record cannot be read.
    """
    # A process that starts at the end of a stage records once more how the next one begins.
    found = {growth.step: growth for growth in (_parsed(r, path, _parse_growth) for r in _read(path) if _is_growth(r))}
    return [found[step] for step in sorted(found)]


def read_events(path: Path, config: GrowthConfig, num_layers: int, num_heads: int) -> list[RecordedEvent]:
    """The decisions in ``path`` that count for a model of ``num_layers`` layers, in order and in its numbers.

    Raises:
        ConfigError: naming what does not fit.
    """
    growths = recorded_growths(path)
    records = [r for r in _read(path) if r.get("kind", "growth") == "growth" and not _is_growth(r)]
    if not records:
        raise ConfigError(f"growth.replay: {path} holds no growth event")
    shapes = _shapes(growths, num_layers, num_heads)
    here = [place for place, shape in enumerate(shapes) if shape == (num_layers, num_heads)]
    if not here:
        raise ConfigError(
            f"growth.replay: {path} records models of {', '.join(f'{n} layers x {h} heads' for n, h in shapes)}; this "
            f"one has {num_layers} layers x {num_heads} heads"
        )
    wanted, to_come = growths[: here[-1]], growths[here[-1] :]
    events: list[RecordedEvent] = []
    for record in records:
        event = _parsed(record, path, _parse)
        if to_come and event.step > to_come[0].step:
            break
        while wanted and event.step > wanted[0].step:
            events = _moved(events, wanted.pop(0), path)
        depth = Counter(earlier.layer for earlier in events if earlier.layer is not None)
        problem = _problem(event, record, config, shapes[here[-1] - len(wanted)], depth)
        if events and event.step <= events[-1].step:
            problem = f"it follows the one of step {events[-1].step}"
        if problem is not None:
            raise ConfigError(f"growth.replay: the event of step {event.step} in {path} does not fit: {problem}")
        events.append(event)
    for growth in wanted:
        events = _moved(events, growth, path)
    return events


def _shapes(growths: Sequence[RecordedGrowth], num_layers: int, num_heads: int) -> list[tuple[int, int]]:
    """Layers and heads of the recorded models; where the record does not say, those of this run."""
    if not growths:
        return [(num_layers, num_heads)]
    first = growths[0]
    shapes = [(max(first.layers) + 1, first.heads[0])]
    shapes += [(len(growth.layers), growth.heads[1]) for growth in growths]
    return [(layers, num_heads if heads is None else heads) for layers, heads in shapes]


def _moved(events: Sequence[RecordedEvent], growth: RecordedGrowth, path: Path) -> list[RecordedEvent]:
    """``events`` of before ``growth`` in the numbers of the layers after it."""
    looping = {event.layer for event in events if event.layer is not None}
    if not looping <= set(growth.heirs):
        raise ConfigError(
            f"growth.replay: the growth of step {growth.step} in {path} does not fit: layers {sorted(looping)} looped "
            f"before, and {sorted(growth.heirs)} went on"
        )
    return [e if e.layer is None else replace(e, layer=growth.heirs[e.layer]) for e in events]


def _is_growth(record: Mapping[str, Any]) -> bool:
    """A record of kind "grow", or the event that a growth leaves in a checkpoint."""
    return record.get("kind") == GREW or ("kind" not in record and record.get("action") == GREW)


def _parsed(record: Mapping[str, Any], path: Path, how: Callable[[Mapping[str, Any]], _Parsed]) -> _Parsed:
    try:
        return how(record)
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise ConfigError(f"growth.replay: {path} holds a damaged growth event: {error!r}") from error


def _parse_growth(record: Mapping[str, Any]) -> RecordedGrowth:
    layers, depth = tuple(int(layer) for layer in record["layers"]), list(record["loop_depth"])
    if len(depth) != len(layers) or {*layers} != {*range(max(layers) + 1)}:
        raise ValueError(f"layers {layers} with depths {depth}")
    heirs = {layers[new]: new for new, loops in enumerate(depth) if loops}
    sizes = [(record.get(f"sizes_{when}") or {}).get("num_attention_heads") for when in ("before", "after")]
    return RecordedGrowth(int(record["step"]), str(record["operator"]), layers, heirs, (sizes[0], sizes[1]))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        about = path.stat()
    except OSError as error:
        raise ConfigError(f"growth.replay: cannot read {path}: {error}") from error
    return _read_once(path, (about.st_mtime_ns, about.st_size))


@lru_cache(maxsize=2)  # a start asks for it several times, and a long run's file is large
def _read_once(path: Path, version: tuple[int, int]) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"growth.replay: cannot read {path}: {error}") from error
    try:
        if not text.lstrip().startswith("["):
            return read_metrics(path)
        return without_void_records(record for record in json.loads(text) if isinstance(record, dict))
    except (DataError, RecursionError, ValueError) as error:
        raise ConfigError(f"growth.replay: {path} is neither a metrics.jsonl nor a JSON list: {error}") from error


def _parse(record: Mapping[str, Any]) -> RecordedEvent:
    action: Action = record["action"]
    if action not in ("first_selection", "select_new_layer", "increase_depth", "fixed"):
        raise ValueError(f"unknown action {action!r}")
    layer = None if action == "fixed" else int(record["layer"])
    kept = () if layer is None else tuple(int(head) for head in record["kept_heads"][str(layer)])
    return RecordedEvent(int(record["step"]), action, layer, kept)


def _problem(
    event: RecordedEvent,
    record: Mapping[str, Any],
    config: GrowthConfig,
    shape: tuple[int, int],
    depth: Mapping[int, int],
) -> str | None:
    num_layers, num_heads = shape
    layer, kept = event.layer, event.kept_heads
    if layer is None:
        return None
    window = record.get("fade_until_step", event.step + config.window_size) - event.step
    if not 0 <= layer < num_layers:
        return f"it names layer {layer}, the model has layers 0 to {num_layers - 1}"
    if not kept or list(kept) != sorted({*kept}) or not 0 <= kept[0] <= kept[-1] < num_heads:
        return f"it keeps heads {list(kept)}, the model has heads 0 to {num_heads - 1}"
    if (event.action == "increase_depth") != (layer in depth):
        return f"layer {layer} was {'already' if layer in depth else 'not yet'} selected"
    if depth.get(layer, 0) >= config.max_loop_depth:
        return f"layer {layer} gets deeper than growth.max_loop_depth = {config.max_loop_depth}"
    if window != config.window_size:
        return f"its window had {window} steps, growth.window_size is {config.window_size}"
    return None
