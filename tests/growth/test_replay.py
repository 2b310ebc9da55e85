"""Recorded growth is repeated: the same plans at the same steps; a record that does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.growth import LoopPlan, SGTSchedule, build_schedule
from megatron_sgt.growth.inherit import Inheritance
from megatron_sgt.growth.replay import ReplaySchedule
from megatron_sgt.jsonl import read_metrics
from megatron_sgt.stages.growth import sizes_of
from megatron_sgt.stages.stages import Stage, stages_of
from tests.helpers.single import small_config

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
    with pytest.raises(ConfigError, match=r"growth\.replay: .* the given model has grown already"):
        schedule.adopt(plans[-1])


STAGES: dict[str, list[dict[str, Any]]] = {
    "stacked": [{"until_steps": 11, "operator": "g_stack", "options": {"factor": 2}}],
    "inserted": [
        {"until_steps": 6, "operator": "midas", "options": {"block_size": 2}},
        {"until_steps": 16, "operator": "msg", "options": {"ffn_hidden_size": 128}},
        {"until_steps": 18, "operator": "lidas", "options": {"block_size": 2}},
    ],
    "heads": [{"until_steps": 11, "operator": "msg", "options": {"num_attention_heads": 6, "hidden_size": 80}}],
    "before anything": [{"until_steps": 2, "operator": "midas", "options": {"block_size": 2}}],
}
GROWING = {**SETTINGS, "max_selected_layers": 3}


def run_through(stages: tuple[Stage, ...], seed: int | None) -> tuple[list[dict[str, Any]], list[LoopPlan], list[Any]]:
    """(records as a run logs them, plan after every step, the schedules of the stages); ``seed``: of entropies."""
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    plans, schedules = [], []
    for stage in stages:
        growth, model = stage.config.growth, stage.config.model
        schedule = build_schedule(growth, model.num_layers, model.num_attention_heads)
        if stage.grown is not None:
            made = stage.grown.growth
            schedule.inherit(schedules[-1], Inheritance(made.layers, made.heirs, made.heads))
            event = schedule.event(stage.first, "grow").to_dict()
            sizes = {"sizes_before": sizes_of(made.old), "sizes_after": sizes_of(made.new)}
            told = {"operator": stage.grown.operator.name, "layers": list(made.layers)}
            records.append({"kind": "grow", **event, **told, **sizes})
        for step in range(stage.first + 1, stage.last + 1):
            if seed is not None:
                shape = (model.num_layers, 1 + growth.max_loop_depth, model.num_attention_heads)
                schedule.observe("entropy", rng.random(shape))
            records += [{"kind": "growth", **event.to_dict()} for event in schedule.after_step(step)]
            plans.append(schedule.plan)
        schedules.append(schedule)
    return records, plans, schedules


@pytest.mark.parametrize("as_list", [False, True], ids=["metrics", "events of a checkpoint"])
@pytest.mark.parametrize("name", STAGES)
def test_a_growing_model_is_repeated_with_its_stages(name: str, as_list: bool, tmp_path: Path) -> None:
    growth, train = {**GROWING, "stages": STAGES[name]}, {"train_iters": STEPS}
    records, plans, _ = run_through(stages_of(small_config(growth=growth, train=train)), seed=4)
    path = write(tmp_path / "metrics.jsonl", [{"kind": "train", "step": 1}, *records])
    if as_list:
        listed = [{name: value for name, value in r.items() if name != "kind"} for r in records]
        Path(path).write_text(json.dumps(listed))
    stages = stages_of(small_config(growth={**growth, "replay": path}, train=train))
    _, replayed, schedules = run_through(stages, seed=None)
    assert replayed == plans
    assert any(plan.layers for plan in plans)
    for stage, schedule in zip(stages, schedules, strict=True):
        model = stage.config.model
        fresh = build_schedule(stage.config.growth, model.num_layers, model.num_attention_heads)
        fresh.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
        assert fresh.plan == schedule.plan == plans[stage.last - 1]
    last = stages[-1].config
    whole = list(schedules[-1].worst_case(STEPS))
    assert [one.plan for one in whole][-1].loops == plans[-1].loops and last.model.num_layers == plans[-1].num_layers


def test_a_growth_that_a_restart_has_recorded_again_counts_once(tmp_path: Path) -> None:
    growth, train = {**GROWING, "stages": STAGES["stacked"]}, {"train_iters": STEPS}
    records, plans, _ = run_through(stages_of(small_config(growth=growth, train=train)), seed=4)
    at = next(n for n, record in enumerate(records) if record["kind"] == "grow")
    lines = [*records[: at + 1], {"kind": "resume", "step": 11}, *records[at:]]
    replayed = {**growth, "replay": write(tmp_path / "m.jsonl", lines)}
    assert run_through(stages_of(small_config(growth=replayed, train=train)), seed=None)[1] == plans


def test_a_record_is_repeated_with_its_own_stages_alone(tmp_path: Path) -> None:
    growth, train = {**GROWING, "stages": STAGES["inserted"]}, {"train_iters": STEPS}
    records, _, _ = run_through(stages_of(small_config(growth=growth, train=train)), seed=4)
    path = write(tmp_path / "m.jsonl", records)
    other = [{**STAGES["inserted"][0], "until_steps": 7}, *STAGES["inserted"][1:]]
    for stages, here in (([], "none"), (STAGES["inserted"][:2], "midas after step 6, msg after step 16"),
                         (other, "midas after step 7")):  # fmt: skip
        with pytest.raises(
            ConfigError, match=f"midas after step 6, .*lidas after step 18, and growth.stages name {here};"
        ):
            stages_of(small_config(growth={**growth, "stages": stages, "replay": path}, train=train))
    shorter = {**growth, "stages": STAGES["inserted"][:1], "replay": path}
    assert len(stages_of(small_config(growth=shorter, train={"train_iters": 16}))) == 2
    plain, _ = record()
    never = write(tmp_path / "plain.jsonl", plain)
    with pytest.raises(
        ConfigError, match=r"records no growth of the model, and growth\.stages name midas after step 6"
    ):
        stages_of(small_config(growth={**growth, "replay": never}, train=train))
    with pytest.raises(ConfigError, match=r"records models of 4 layers x 4 heads, .*; this one has 5 layers x 4 heads"):
        replay(path)


@pytest.mark.parametrize("change", [{"layers": [0, 0]}, {"layers": "x"}, {"loop_depth": None}, {"layers": [1, 2]}])
def test_a_damaged_record_of_a_growth(change: dict[str, Any], tmp_path: Path) -> None:
    growth, train = {**GROWING, "stages": STAGES["stacked"]}, {"train_iters": STEPS}
    records, _, _ = run_through(stages_of(small_config(growth=growth, train=train)), seed=4)
    spoilt = [{**r, **change} if r["kind"] == "grow" else r for r in records]
    with pytest.raises(ConfigError, match="holds a damaged growth event"):
        stages_of(small_config(growth={**growth, "replay": write(tmp_path / "m.jsonl", spoilt)}, train=train))
    lost = [{**r, "loop_depth": [0] * 8} if r["kind"] == "grow" else r for r in records]
    with pytest.raises(ConfigError, match=r"the growth of step 11 .* layers \[.*\] looped before, and \[\] went on"):
        build_schedule(GrowthConfig(**GROWING, replay=write(tmp_path / "n.jsonl", lost)), 8, 4)
