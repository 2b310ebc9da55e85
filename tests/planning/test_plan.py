"""The numbers of a plan: that they are those of the formulas, add up, and pass through JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.arch.attended_pairs import AttendedPairs
from megatron_sgt.config import load_config
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.flops import step_flops
from megatron_sgt.planning.hardware import find_gpu
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.planning.plan import make_plan
from megatron_sgt.planning.render import render
from megatron_sgt.planning.step_time import Machine
from megatron_sgt.planning.structure import final_plan
from megatron_sgt.stages.stages import stages_of

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))
MACHINE = Machine(find_gpu("h100"))


def plan_of(name: str, ranks: int, *overrides: str) -> tuple[Any, dict[str, Any]]:
    path = EXAMPLES[0].parent / f"{name}.yaml"
    config = load_config(path, ["model.vocab_size=32000", *overrides])
    return config, make_plan(config, ranks, MACHINE, 0.4, "bf16")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_has_a_plan_that_json_takes(path: Path) -> None:
    config = load_config(path, ["model.vocab_size=32000"])
    shared = config.parallel.model_parallel_size
    unit = config.train.micro_batch_size * (64 // shared)
    ranks = shared if config.train.global_batch_size % unit else 64
    precision = "fp32" if config.parallel.device == "cpu" else "bf16"
    plan = make_plan(config, ranks, MACHINE, 0.4, precision)
    assert json.loads(json.dumps(plan)) == plan
    assert plan["parameters"]["total"] == parameter_count(stages_of(config)[-1].config.model)
    assert plan["parameters"]["total"] == sum(v for k, v in plan["parameters"].items() if k != "total")


def test_the_flops_of_the_run_are_those_of_its_stretches() -> None:
    config, plan = plan_of("sgt_7b", 32)
    vanilla = step_flops(config.model, LoopPlan.empty(32), 1024).model
    fixed = step_flops(config.model, final_plan(config), 1024).model
    first, last = plan["compute"][0], plan["compute"][-1]
    assert (first["phase"], first["flops"]) == ("vanilla", 1000 * vanilla)
    assert (last["phase"], last["flops"]) == ("fixed", 28000 * fixed)
    assert plan["run"]["flops"] == sum(entry["flops"] for entry in plan["compute"])
    steps = [step for entry in plan["compute"] for step in (entry["first_step"], entry["last_step"])]
    assert steps == [1, 1000, 1001, 2000, 2001, 3000, 3001, 4000, 4001, 32000]


def test_a_curriculum_divides_the_stretches() -> None:
    """Attention's FLOPs of a token are in proportion to the length; nothing else changes."""
    curriculum = (
        "data.seq_length_curriculum=[{until_steps: 500, seq_length: 1024}, {until_steps: 2500, seq_length: 2048}]"
    )
    config, plan = plan_of("sgt_7b", 32, curriculum)
    _, plain = plan_of("sgt_7b", 32)
    found = [
        (entry["phase"], entry["first_step"], entry["last_step"], entry["seq_length"]) for entry in plan["compute"]
    ]
    assert found[:3] == [("vanilla", 1, 500, 1024), ("vanilla", 501, 1000, 2048), ("window", 1001, 2000, 2048)]
    assert found[-1] == ("fixed", 4001, 32000, 4096)
    parts = step_flops(config.model, LoopPlan.empty(32), 1024)
    assert plan["compute"][0]["flops"] == 500 * 3 * (parts.linear + parts.attention // 4)
    assert plan["compute"][-1] == plain["compute"][-1]
    assert plan["run"]["flops"] == sum(entry["flops"] for entry in plan["compute"]) < plain["run"]["flops"]
    assert (plan["memory"], plan["traffic"], plan["batch"]) == (plain["memory"], plain["traffic"], plain["batch"])


def test_documents_are_assumed_or_measured() -> None:
    config, plain = plan_of("sgt_7b", 32)
    masked, assumed = plan_of("sgt_7b", 32, "data.reset_attention_mask=true")
    assert "documents" not in plain and assumed.pop("documents") == {"measured": False} and assumed == plain
    quarter = AttendedPairs(((4096, 4 * 1024 * 1025 / 2),), padding=0.01)
    measured = make_plan(masked, 32, MACHINE, 0.4, "bf16", quarter)
    assert measured["documents"] == {
        "measured": True, "pairs": {"4096": 4 * 1024 * 1025 / 2}, "share": {"4096": 0.25}, "padding": 0.01
    }  # fmt: skip
    parts = step_flops(config.model, LoopPlan.empty(32), 1024)
    assert measured["compute"][0]["flops"] == 1000 * 3 * (parts.linear + parts.attention // 4)
    assert measured["run"]["flops"] < plain["run"]["flops"]
    assert measured["step_time"]["vanilla"]["compute"] < plain["step_time"]["vanilla"]["compute"]
    assert [plan["memory"] for plan in (measured, assumed)] == [plain["memory"]] * 2


def test_days_follow_from_flops_peak_and_mfu() -> None:
    _, plan = plan_of("sgt_7b", 32)
    assert plan["run"]["days"] == pytest.approx(plan["run"]["flops"] / (32 * 989.4e12 * 0.4) / 86400)


def test_memory_adds_up_at_every_moment() -> None:
    _, plan = plan_of("sgt_13b", 64)
    for moment in ("now", "window", "final"):
        parts = plan["memory"][moment]
        assert parts["total"] == sum(value for name, value in parts.items() if name != "total")
    assert plan["memory"]["now"]["loops"] == 0 < plan["memory"]["final"]["loops"]
    assert plan["memory"]["final"]["loops"] < plan["memory"]["window"]["loops"]


def test_other_layouts_are_the_plans_of_other_configurations() -> None:
    _, plan = plan_of("sgt_7b", 32)
    table = {row["zero_stage"]: row for row in plan["peak_by_layout"]}
    for stage, granularity in ((1, "none"), (3, "full"), (2, "selective")):
        settings = (f"parallel.zero_stage={stage}", f"train.recompute_granularity={granularity}")
        _, other = plan_of("sgt_7b", 32, *settings)
        worst = max(other["memory"][moment]["total"] for moment in ("now", "window", "final"))
        assert table[stage][granularity] == worst
    assert table[0] == {
        "zero_stage": 0,
        "none": None,
        "selective": None,
        "full": None,
    }  # ZeRO-0 in bf16 is refused


def test_balanced_passes_send_less_than_naive_ones_and_vanilla_none() -> None:
    _, grown = plan_of("sgt_7b", 32)
    passes = grown["traffic"]["loop_pass"]
    assert 8 * passes["balanced"] <= passes["owner"] < grown["traffic"]["layer"]
    _, vanilla = plan_of("vanilla_7b", 32)
    assert "loop_pass" not in vanilla["traffic"]
    assert {item["part"] for item in vanilla["traffic"]["per_step"]}.isdisjoint({"loops", "entropy"})


@pytest.mark.parametrize(
    "settings", [("model.qk_layernorm=true", "model.qk_layernorm_over=all"), ("model.attention_dropout=0.1",)]
)
def test_no_balanced_passes_are_promised_where_the_rules_refuse_them(settings: tuple[str, ...]) -> None:
    config, plan = plan_of("sgt_7b", 32, *settings)
    assert plan["traffic"]["loop_pass"].keys() == {"owner"}
    assert {"owner", "balanced"} & plan["step_time"].keys() == {"owner"}
    assert "balanced" not in render(plan, config, "a plan")
    with pytest.raises(ConfigError, match=r"parallel\.loop_method: balanced"):
        plan_of("sgt_7b", 32, *settings, "parallel.loop_method=balanced")


def test_an_average_of_the_weights_takes_four_bytes_per_parameter_shared_like_the_optimizer() -> None:
    """7B at tensor parallel 2, ZeRO-1 over 16 ranks, where nothing is padded; and off, nothing."""
    config, plan = plan_of("sgt_7b", 32, "train.ema_decay=0.999")
    _, without = plan_of("sgt_7b", 32)
    count = parameter_count(config.model)
    for moment in ("now", "window", "final"):
        assert plan["memory"][moment]["average"] == 4 * parameter_count(config.model, 2) // 16
        assert without["memory"][moment]["average"] == 0
        more = plan["memory"][moment]["total"] - without["memory"][moment]["total"]
        assert more == plan["memory"][moment]["average"]
    assert plan["checkpoint"]["bytes"] - without["checkpoint"]["bytes"] == 4 * count


def test_checkpoints() -> None:
    config, plan = plan_of("sgt_7b", 32)
    size = 14 * parameter_count(config.model)
    expected = {"bytes": size, "saves": 32, "kept": 3, "milestones": 8, "at_the_end": 10}
    assert plan["checkpoint"] == expected
