"""Recorded growth is repeated: the same plans at the same steps; a record that does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.growth import LoopPlan, SGTSchedule, build_schedule
from megatron_sgt.growth.replay import ReplaySchedule
from megatron_sgt.jsonl import read_metrics

LAYERS, HEADS, STEPS = 5, 4, 40
SETTINGS: dict[str, Any] = {
    "first_selection_step": 4, "window_size": 5, "num_keep_heads": 2, "max_loop_depth": 2, "top_k_layers": 3,
    "max_selected_layers": 2, "decay_type": "cosine",
}  # fmt: skip


def record(**settings: Any) -> tuple[list[dict[str, Any]], list[LoopPlan]]:
    """(event records as a run logs them, plan after every step) of a schedule that decides."""
    rng = np.random.default_rng(3)
    config = GrowthConfig(**{**SETTINGS, **settings})
    schedule = SGTSchedule(config, LAYERS, HEADS)
    records, plans = [], []
    for step in range(1, STEPS + 1):
        schedule.observe("entropy", rng.random((LAYERS, 1 + config.max_loop_depth, HEADS)))
        for event in schedule.after_step(step):
            entry = {"kind": "growth", **event.to_dict()}
            if event.action in ("first_selection", "select_new_layer"):
                entry["fade_until_step"] = step + config.window_size
            records.append(entry)
        plans.append(schedule.plan)
    return records, plans


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def replay(path: str, **settings: Any) -> ReplaySchedule:
    schedule = build_schedule(GrowthConfig(**{**SETTINGS, **settings}, replay=path), LAYERS, HEADS)
    assert isinstance(schedule, ReplaySchedule)
    return schedule


@pytest.mark.parametrize("as_list", [False, True])
def test_the_same_plan_after_every_step(as_list: bool, tmp_path: Path) -> None:
    records, plans = record()
    assert {r["action"] for r in records} == {
        "first_selection",
        "select_new_layer",
        "increase_depth",
        "fixed",
    }
    path = write(tmp_path / "metrics.jsonl", [{"kind": "train", "step": 1}, *records])
    if as_list:
        (tmp_path / "metrics.jsonl").write_text(json.dumps(records))
    schedule = replay(path)
    assert not schedule.wanted
    replayed, events = [], []
    for step in range(1, STEPS + 1):
        events += schedule.after_step(step)
        replayed.append(schedule.plan)
    assert replayed == plans
    assert [(e.step, e.action, e.layer) for e in events] == [(r["step"], r["action"], r["layer"]) for r in records]
    assert schedule.final_plan() == plans[-1]


def test_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    records, plans = record()
    path = write(tmp_path / "m.jsonl", records)
    first, second = replay(path), replay(path)
    for step in range(1, 12):
        first.after_step(step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(12, STEPS + 1):
        second.after_step(step)
    assert second.plan == plans[-1]
    write(tmp_path / "m.jsonl", records[:-1])
    with pytest.raises(CheckpointError, match="other events"):
        replay(path).load_state_dict(first.state_dict())


def test_what_a_resume_declared_void_is_not_repeated(tmp_path: Path) -> None:
    records, _ = record()
    wrong = {**records[1], "layer": 3}
    lines = [records[0], wrong, {"kind": "resume", "step": records[0]["step"]}, *records[1:]]
    schedule = replay(write(tmp_path / "m.jsonl", lines))
    assert [e.step for e in schedule._recorded] == [r["step"] for r in records]


@pytest.mark.parametrize("as_list", [False, True])
def test_a_fresh_start_voids_a_recorded_step_0(as_list: bool, tmp_path: Path) -> None:
    """As for every other reader of a metrics file: a resume at step 0 voids what stands before it, step 0 too."""
    records, _ = record()
    lines = [{**records[0], "step": 0, "fade_until_step": 5}, {"kind": "resume", "step": 0}, *records]
    path = write(tmp_path / "m.jsonl", lines)
    assert [r["step"] for r in read_metrics(path) if r["kind"] == "growth"] == [r["step"] for r in records]
    if as_list:
        Path(path).write_text(json.dumps(lines))
    assert [e.step for e in replay(path)._recorded] == [r["step"] for r in records]


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"layer": 7, "kept_heads": {"7": [0, 1]}}, {}, "layer 7, the model has layers 0 to 4"),
        ({"kept_heads": {"LAYER": [0, 9]}}, {}, "heads .0, 9., the model has heads 0 to 3"),
        ({"kept_heads": {"LAYER": []}}, {}, "keeps heads"),
        ({"action": "increase_depth"}, {}, "not yet selected"),
        ({"action": "grow"}, {}, "damaged growth event.*unknown action"),
        ({"kept_heads": {}}, {}, "damaged growth event"),
        ({}, {"window_size": 6}, "window had 5 steps, growth.window_size is 6"),
        ({}, {"max_loop_depth": 1}, "deeper than growth.max_loop_depth = 1"),
        ({"step": 100, "fade_until_step": 105}, {}, "follows the one of step 100"),
    ],
)
def test_a_record_that_does_not_fit(
    change: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    records, _ = record()
    first = {**records[0], **change}
    if "LAYER" in first["kept_heads"]:
        first["kept_heads"] = {str(first["layer"]): first["kept_heads"]["LAYER"]}
    path = write(tmp_path / "m.jsonl", [first, *records[1:]])
    with pytest.raises(ConfigError, match=message):
        replay(path, **settings)


def test_files_that_are_no_record(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        replay(str(tmp_path / "absent"))
    (tmp_path / "x").write_text("hello\n")
    with pytest.raises(ConfigError, match=r"neither a metrics\.jsonl nor a JSON list"):
        replay(str(tmp_path / "x"))
    with pytest.raises(ConfigError, match="no growth event"):
        replay(write(tmp_path / "y", [{"kind": "train", "step": 1}]))


def test_has_no_effect_with_another_method() -> None:
    assert list(GrowthConfig(method="sgt", replay="x").problems()) == []
    assert "no effect" in next(iter(GrowthConfig.model_construct(method="vanilla", replay="x").problems()))


def test_a_model_that_has_grown_is_not_grown_again(tmp_path: Path) -> None:
    events, plans = record()
    schedule = replay(write(tmp_path / "metrics.jsonl", events))
    with pytest.raises(ConfigError, match=r"growth\.replay: .* the imported model has grown already"):
        schedule.adopt(plans[-1])
