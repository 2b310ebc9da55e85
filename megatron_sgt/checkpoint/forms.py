"""What the JSON files of a checkpoint must look like: whoever reads them trusts the types that are checked here.

Checksums find what was changed by mistake; a file that was edited by hand, or whose checksums were made anew, is found
here. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint import layout
from megatron_sgt.config import Config, recorded_config
from megatron_sgt.errors import ConfigError, DamagedCheckpointError, first_line

LAYOUT_FREE = "layout_free"
"""Key in sgt_state.json: what a layout-free checkpoint was made from."""
IMPORTED_FROM = "imported_from"
"""Key below it: the folder of an imported model; absent in the checkpoint of a run."""
HELD = "quantities"
"""Key below it: what of weights, moments and average it holds, where that is not everything."""
STAGE = "stage"
"""Key below it: how often the model has grown, where it has (checkpoint/surgery)."""
COUNTERS = ("step", "consumed_samples", "skipped_steps", "consecutive_skipped")
"""The counters of the training state."""

_LARGEST_CONFIG = 1 << 24
_MOST = 1 << 53
_MOST_RANKS = 1 << 24
_QUANTITIES = {"weights", "exp_avg", "exp_avg_sq", "ema"}


class FormError(ValueError):
    """Says what is not as it was written."""


def fields(value: Any, place: str) -> Mapping[str, Any]:
    """``value``, which must be an object.

    Raises:
        FormError: it is none.
    """
    if not isinstance(value, dict):
        raise FormError(f"{place} {_is(value)}, not an object")
    return value


def whole(value: Any, place: str, least: int = 0, most: int = _MOST) -> int:
    """``value``, which must be an integer from ``least`` to ``most``.

    Raises:
        FormError: it is none.
    """
    if type(value) is not int or not least <= value <= most:
        raise FormError(f"{place} {_is(value)}, not a whole number from {least} on")
    return value


def _is(value: Any) -> str:
    """The value in a few words."""
    if value is None or isinstance(value, str | bool | int | float):
        text = ascii(value) if not isinstance(value, int) or abs(value) <= _MOST else "a huge number"
        return f"is {text if len(text) <= 40 else f'{text[:40]}...'}"
    return f"is {'a list' if isinstance(value, list) else 'an object'}"


def known_layout(value: Any, place: str) -> None:
    """Check a layout as ``checkpoint.save.layout_of`` makes it; None is that of a layout-free checkpoint.

    Raises:
        FormError: it is none.
    """
    if value is None:
        return
    where = fields(value, place)
    for name in ("tensor_model_parallel_size", "data_parallel_size"):
        whole(where.get(name), f"{place}.{name}", 1, _MOST_RANKS)
    whole(where.get("zero_stage"), f"{place}.zero_stage", 0, 3)
    _check_pipeline(where, place)
    for name in ("precision", "weight_decay_on", "optimizer"):
        if not isinstance(where.get(name, ""), str):
            raise FormError(f"{place}.{name} {_is(where[name])}, not a text")


def _check_pipeline(where: Mapping[str, Any], place: str) -> None:
    """The stages of a pipeline, and the layers of all their chunks; a layout without one has neither."""
    if layout.PIPELINE_SIZE not in where and layout.PIPELINE_COUNTS not in where:
        return
    size = whole(where.get(layout.PIPELINE_SIZE), f"{place}.{layout.PIPELINE_SIZE}", 2, _MOST_RANKS)
    name = f"{place}.{layout.PIPELINE_COUNTS}"
    counts = [whole(count, f"an entry of {name}", 1) for count in _listed(where.get(layout.PIPELINE_COUNTS), name)]
    if not counts or len(counts) % size:
        raise FormError(f"{name} has {len(counts)} entries for {size} stages")


def read_config(folder: Path) -> Config:
    """The configuration that the checkpoint ``folder`` was saved with.

    Raises:
        DamagedCheckpointError: it cannot be read.
    """
    path = folder / layout.CONFIG_FILE
    try:
        if (size := path.stat().st_size) > _LARGEST_CONFIG:
            raise ConfigError(f"it has {size:,} bytes")
        return recorded_config(path)
    except (OSError, ConfigError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {first_line(error)}") from error


def read_state(folder: Path) -> dict[str, Any]:
    """The state in ``folder``: counters of the training state, states of the hooks, layout.

    Raises:
        DamagedCheckpointError: it cannot be read, or no save has written it.
    """
    path = folder / layout.STATE_FILE
    content = layout.read_json(path)
    try:
        return _checked(content)
    except FormError as error:
        raise DamagedCheckpointError(f"{path} is damaged: {error}; copy the checkpoint again") from error


def _checked(content: Any) -> dict[str, Any]:
    state = dict(fields(content, "it"))
    trainer = fields(state.get("trainer"), "trainer")
    for name in COUNTERS:
        whole(trainer.get(name), f"trainer.{name}")
    for name, saved in fields(state.get("hooks"), "hooks").items():
        fields(saved, f"hooks.{name}")
    if layout.AVERAGE_STATE in state:
        decay = fields(state[layout.AVERAGE_STATE], layout.AVERAGE_STATE).get("decay")
        if not isinstance(decay, float) or not 0 < decay < 1:
            raise FormError(f"{layout.AVERAGE_STATE}.decay {_is(decay)}, not a number between 0 and 1")
    _check_growth(state["hooks"].get(layout.GROWTH_STATE))
    _check_stages(state.get(layout.STAGES_STATE, []), trainer["step"])
    _check_data(state.get(layout.DATA_STATE, []), trainer["consumed_samples"])
    for name, kept in fields(state.get(layout.IMPORTED_STATE, {}), layout.IMPORTED_STATE).items():
        if not isinstance(kept, str):
            fields(kept, f"{layout.IMPORTED_STATE}.{name}")
    _check_origin(state.get(layout.ORIGIN_STATE))
    if "layout" not in state:
        raise FormError("layout is missing")
    known_layout(state["layout"], "layout")
    if LAYOUT_FREE in state or state["layout"] is None:
        free = fields(state.get(LAYOUT_FREE), LAYOUT_FREE)
        whole(free.get("optimizer_step"), f"{LAYOUT_FREE}.optimizer_step")
        known_layout(free.get("source_layout"), f"{LAYOUT_FREE}.source_layout")
        scale = free.get("loss_scale")
        if scale is not None and (type(scale) not in (int, float) or not 0 < scale < math.inf):
            raise FormError(f"{LAYOUT_FREE}.loss_scale {_is(scale)}, not a number above 0")
        if not isinstance(free.get(IMPORTED_FROM, ""), str):
            raise FormError(f"{LAYOUT_FREE}.{IMPORTED_FROM} {_is(free[IMPORTED_FROM])}, not a text")
        whole(free.get(STAGE, 0), f"{LAYOUT_FREE}.{STAGE}")
        held = free.get(HELD, ["weights"])
        if not isinstance(held, list) or not {"weights"} <= set(map(str, held)) <= _QUANTITIES:
            raise FormError(f"{LAYOUT_FREE}.{HELD} {_is(held)}, not a list of what a checkpoint holds")
        if IMPORTED_FROM not in free and free.get("source_layout") is None:
            raise FormError(f"{LAYOUT_FREE}.source_layout is missing")
    return state


def _check_origin(origin: Any) -> None:
    """What checkpoint/new_run.py has written: whose weights the run began with."""
    if origin is None:
        return
    place = layout.ORIGIN_STATE
    for name in ("step", "tokens"):
        whole(fields(origin, place).get(name), f"{place}.{name}")
    for name in ("checkpoint", "weights", "growth"):
        if not isinstance(origin.get(name), str):
            raise FormError(f"{place}.{name} {_is(origin.get(name))}, not a text")


def _check_growth(growth: Any) -> None:
    if growth is None:
        return
    fields(growth.get("schedule"), "hooks.growth.schedule")
    events = growth.get("events")
    if not isinstance(events, list):
        raise FormError(f"hooks.growth.events {_is(events)}, not a list")
    for event in events:
        fields(event, "an event in hooks.growth.events")


def _check_stages(stages: Any, step: int) -> None:
    """What stages/stages.py has written: how each stage but the first began."""
    before, place = 0, layout.STAGES_STATE
    for record in _listed(stages, place):
        before = whole(fields(record, f"an entry of {place}").get("step"), f"{place}.step", before + 1, step)
        fields(record.get("options"), f"{place}.options")
        for name in ("operator", "moments", "optimizer", "lr_policy", "weights"):
            if not isinstance(record.get(name), str):
                raise FormError(f"{place}.{name} {_is(record.get(name))}, not a text")


def _check_data(orders: Any, consumed: int) -> None:
    """What data/history.py has written: from which sample on the run has read in which order."""
    before, place = 0, layout.DATA_STATE
    for entry in _listed(orders, place):
        before = whole(
            fields(entry, f"an entry of {place}").get("from_sample"), f"{place}.from_sample", before, consumed
        )
        whole(entry.get("seq_length"), f"{place}.seq_length", 1)
        whole(entry.get("seed"), f"{place}.seed", 0, (1 << 64) - 1)
        shares = [_share(share, f"{place}.shares") for share in _listed(entry.get("shares"), f"{place}.shares")]
        if len(shares) != 3:
            raise FormError(f"{place}.shares has {len(shares)} numbers, not 3")
        files = _listed(entry.get("files"), f"{place}.files")
        for file in files:
            weight = _share(fields(file, f"an entry of {place}.files").get("weight"), f"{place}.files.weight")
            whole(file.get("documents"), f"{place}.files.documents")
            whole(file.get("tokens"), f"{place}.files.tokens")
            whole(file.get("samples", 0), f"{place}.files.samples")
            if weight * (1 << 18) < 1:
                raise FormError(f"{place}.files.weight is too small")
        _check_places(entry, len(files), before)
        texts = [entry.get("dataset"), entry.get("split")]
        texts += [file.get(name) for file in files for name in ("prefix", "lengths", "content")]
        if not all(isinstance(text, str) for text in texts):
            raise FormError(f"an entry of {place} lacks a text")


def _check_places(entry: Mapping[str, Any], files: int, start: int) -> None:
    """Where the sources stand (data/ledger.py); a span that starts a run does not say it."""
    place = layout.DATA_STATE
    whole(entry.get("origin", 0), f"{place}.origin", 0, start)
    places = _listed(entry.get("places", []), f"{place}.places")
    if places and len(places) != files:
        raise FormError(f"{place}.places has {len(places)} entries for {files} files")
    for one in places:
        whole(fields(one, f"an entry of {place}.places").get("number"), f"{place}.places.number")
        whole(one.get("drawn"), f"{place}.places.drawn")
        if "former" in one:
            former = fields(one["former"], f"{place}.places.former")
            for name, least in (("documents", 1), ("samples", 1), ("drawn", 0)):
                whole(former.get(name), f"{place}.places.former.{name}", least)


def _listed(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise FormError(f"{place} {_is(value)}, not a list")
    return value


def _share(value: Any, place: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise FormError(f"{place} {_is(value)}, not a number from 0 to 1")
    return float(value)
