"""The stages of a run as a plan sees them: exact per stage, sums over the run, and what its largest model needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.config import Config, load_config
from megatron_sgt.growth import LoopPlan
from megatron_sgt.metrics.units import file_size
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.planning.advice import changed, warnings
from megatron_sgt.planning.flops import step_flops
from megatron_sgt.planning.hardware import USABLE, find_gpu
from megatron_sgt.planning.parameters import checkpoint_bytes, parameter_count
from megatron_sgt.planning.plan import make_plan
from megatron_sgt.planning.rank_memory import peak_memory
from megatron_sgt.planning.render import WIDTH, render
from megatron_sgt.planning.stages import largest_checkpoint, plan_stages, stage_table
from megatron_sgt.planning.step_time import Machine
from megatron_sgt.stages.timing import g_stack_time
from tests.helpers.flops import flop_counter
from tests.helpers.single import random_batch, single_model, small_config

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"
MACHINE = Machine(find_gpu("h100"))
G_STACK = {"operator": "g_stack", "options": {"factor": 4}}
MIDAS = {"operator": "midas", "options": {"block_size": 4}}
FFN = {"operator": "msg", "options": {"ffn_hidden_size": 11008}}


def example(layers: int, ffn: int, *stages: dict[str, Any], interval: int = 1000) -> Config:
    """A 7B run of 32,000 steps that begins smaller."""
    overrides = [
        "model.vocab_size=32000", f"model.num_layers={layers}", f"model.ffn_hidden_size={ffn}",
        f"checkpoint.save_interval={interval}", f"growth.stages={json.dumps(stages)}",
    ]  # fmt: skip
    return load_config(EXAMPLES / "sgt_7b.yaml", overrides)


GRADUAL = (
    {"until_steps": 2500, **MIDAS},
    {"until_tokens": 6000 * 1024 * 4096, **MIDAS},
    {"until_steps": 12_000, **FFN},
)


def test_each_stage_is_the_plan_of_its_own_configuration() -> None:
    config = example(24, 8192, *GRADUAL)
    stages = plan_stages(config)
    table = stage_table(stages, 32, MACHINE, 0.4, "bf16")
    assert json.loads(json.dumps(table)) == table
    steps = [(row["first_step"], row["last_step"]) for row in table["rows"]]
    assert steps == [(1, 2500), (2501, 6000), (6001, 12_000), (12_001, 32_000)]
    for one, row in zip(stages, table["rows"], strict=True):
        alone = make_plan(one.config, 32, MACHINE, 0.4, "bf16")
        inside = [
            entry["flops"]
            * (min(entry["last_step"], row["last_step"]) - max(entry["first_step"], row["first_step"]) + 1)
            // (entry["last_step"] - entry["first_step"] + 1)
            for entry in alone["compute"]
            if entry["last_step"] >= row["first_step"] and entry["first_step"] <= row["last_step"]
        ]
        assert row["flops"] == sum(inside)
        assert row["parameters"] == alone["parameters"]["total"]
        assert row["checkpoint_bytes"] == alone["checkpoint"]["bytes"]
        assert row["peak"] <= max(alone["memory"][name]["total"] for name in ("now", "window", "final"))
    sizes = [(row["num_layers"], row["hidden_size"], row["ffn_hidden_size"]) for row in table["rows"]]
    assert sizes == [(24, 4096, 8192), (28, 4096, 8192), (32, 4096, 8192), (32, 4096, 11008)]


def test_the_run_is_the_sum_of_its_stages() -> None:
    config = example(24, 8192, *GRADUAL)
    plan = make_plan(config, 32, MACHINE, 0.4, "bf16")
    rows, table = plan["stages"]["rows"], plan["stages"]
    assert plan["run"]["flops"] == sum(row["flops"] for row in rows) == sum(e["flops"] for e in plan["compute"])
    assert plan["run"]["tokens"] == 32_000 * 1024 * 4096 == sum(row["tokens"] for row in rows)
    assert plan["run"]["days"] == pytest.approx(sum(row["days"] for row in rows))
    last = plan_stages(config)[-1].config
    scratch = make_plan(last, 32, MACHINE, 0.4, "bf16")["run"]["flops"]
    assert table["scratch_flops"] == scratch
    assert table["saving"] == scratch / plan["run"]["flops"] - 1 > 0
    assert plan["parameters"]["total"] == parameter_count(last.model) == rows[-1]["parameters"]
    assert plan["memory"]["stage"] == 3
    assert table["peak"] == max(row["peak"] for row in rows) == plan["memory"]["now"]["total"]
    chosen = next(row for row in plan["peak_by_layout"] if row["zero_stage"] == 1)
    assert chosen["none"] == table["peak"]
    assert table["boundaries_s"] == pytest.approx(sum(row["boundary_s"]["total"] for row in rows[1:]))


def test_every_step_of_every_stage_has_its_length() -> None:
    """Added up step by step; entries end inside stages, and stages inside entries."""
    entries = '[{"until_steps": 1000, "seq_length": 512}, {"until_steps": 7000, "seq_length": 2048}]'
    config = changed(example(24, 8192, *GRADUAL), {"data.seq_length_curriculum": json.loads(entries)})
    plan = make_plan(config, 32, MACHINE, 0.4, "bf16")
    total, costs = 0, {}
    for one in plan_stages(config):
        for stretch in one.stretches:
            for step in range(stretch.first, stretch.last + 1):
                length = 512 if step <= 1000 else 2048 if step <= 7000 else 4096
                key = one.config.model.num_layers, one.config.model.ffn_hidden_size, stretch.plan, length
                if key not in costs:
                    model = one.config.model.model_copy(update={"seq_length": length})
                    costs[key] = step_flops(model, stretch.plan, 1024 * 4096 // length).model
                total += costs[key]
    assert plan["run"]["flops"] == total == sum(entry["flops"] for entry in plan["compute"])
    assert plan["run"]["flops"] == sum(row["flops"] for row in plan["stages"]["rows"])
    table = [line for line in render(plan, config, "").splitlines() if ", T " in line and ".." in line]
    assert len(table) == len(plan["compute"])
    assert {len(line) for line in table} == {WIDTH - 2}, "columns stay under one another"


@pytest.mark.parametrize(
    ("interval", "kept", "sizes"),
    [
        (1000, 3, (1, 1, 1, 3)),
        (6000, 4, (1, 1, 1, 3)),
        (4000, 0, (1, 2, 2, 5)),
        (20_000, 3, (1, 1, 1, 1)),
        (0, 3, (1, 1, 1, 1)),
    ],
)
def test_disk_holds_the_newest_that_are_kept_and_the_last_of_each_stage(
    interval: int, kept: int, sizes: tuple[int, ...]
) -> None:
    """``sizes``: how many checkpoints of each stage; they end with steps 2,500, 6,000, 12,000 and 32,000."""
    config = example(24, 8192, *GRADUAL, interval=interval)
    saves = config.checkpoint.model_copy(update={"keep_last": kept, "keep_every": 0})
    config = config.model_copy(update={"checkpoint": saves})
    stages = plan_stages(config)
    each = [checkpoint_bytes(one.config, "bf16") for one in stages]
    table = stage_table(stages, 32, MACHINE, 0.4, "bf16")
    assert table["boundary_saves"] == each[:-1]
    assert table["on_disk"] == sum(n * size for n, size in zip(sizes, each, strict=True))
    assert largest_checkpoint(config, "bf16") == each[-1] > each[0]


def test_g_stack_saves_what_its_source_says_at_equal_tokens() -> None:
    """One tenth of the tokens at a quarter of the layers: the base model's FLOPs count."""
    config = example(8, 11008, {"until_steps": 3200, **G_STACK}, interval=0)
    config = config.model_copy(update={"growth": config.growth.model_copy(update={"method": "vanilla"})})
    small, large = (step_flops(one.config.model, next(iter(one.plans)), 1024).model for one in plan_stages(config))
    table = stage_table(plan_stages(config), 32, MACHINE, 0.4, "bf16")
    assert table["saving"] == pytest.approx(32 * large / (3.2 * small + 28.8 * large) - 1, rel=1e-12)
    assert 0.07 < table["saving"] < 0.08


def test_g_stack_is_told_when_its_source_would_grow() -> None:
    """Of 134 B tokens it would take more than a tenth; a tiny model is outside the fit, too."""
    config = example(8, 11008, {"until_steps": 2623, **G_STACK})
    plan = make_plan(config, 32, MACHINE, 0.4, "bf16")
    fit = plan["stages"]["rows"][1]["growth_time"]
    assert fit["configured"] == 2623 * 1024 * 4096 and fit["in_range"] and fit["clamped"]
    expected = g_stack_time(plan["parameters"]["total"], plan["run"]["tokens"])
    assert (fit["fitted"], fit["tokens"]) == (expected.fitted, plan["run"]["tokens"] / 10)
    flat = " ".join(render(plan, config, "").split())
    fitted = f"{expected.fitted / 1e9:.1f} B tokens (clamped to 13.4 B, a tenth of the run), arXiv 2405.15319"
    assert f"growth time after 11.0 B tokens; fitted growth time {fitted}" in flat
    small = small_config(growth={"stages": [{"until_steps": 3, **G_STACK}]})
    text = " ".join(render(make_plan(small, 1, MACHINE, 0.4, "fp32"), small, "").split())
    assert "(clamped to 64.0, a tenth of the run; outside the models and runs that the fit was made of)" in text
    twice = example(8, 8192, {"until_steps": 2623, **G_STACK}, {"until_steps": 9000, **FFN})
    for other in (example(28, 11008, GRADUAL[0]), twice):  # which the fit is not about
        assert all(
            "growth_time" not in row for row in stage_table(plan_stages(other), 32, MACHINE, 0.4, "bf16")["rows"]
        )


def test_the_flops_of_every_stage_equal_the_counter() -> None:
    stages = [
        {"until_steps": 3, "operator": "midas", "options": {"block_size": 2}},
        {"until_steps": 6, "operator": "msg",
         "options": {"hidden_size": 80, "ffn_hidden_size": 128, "num_attention_heads": 6}},
    ]  # fmt: skip
    growth = {"first_selection_step": 2, "window_size": 2, "max_selected_layers": 2, "top_k_layers": 2,
              "max_loop_depth": 1, "num_keep_heads": 1}  # fmt: skip
    config = small_config(growth={**growth, "stages": stages})
    counted = 0
    for one in plan_stages(config):
        model = single_model(one.config)
        for stretch in one.stretches:
            apply_plan(model, stretch.plan)
            with flop_counter() as counter:
                model(**random_batch(one.config)).backward()
            formula = step_flops(one.config.model, stretch.plan, 2)
            assert counter.get_total_flops() == formula.executed
            counted += stretch.steps * formula.model
    assert counted == make_plan(config, 1, MACHINE, 0.4, "fp32")["run"]["flops"]


def test_memory_that_a_later_stage_bursts_is_told_beforehand() -> None:
    config = example(8, 11008, {"until_steps": 2623, **G_STACK})
    stages = plan_stages(config)
    small, large = (one.peak(32, "bf16") for one in stages)
    gpu = find_gpu("h100")
    between = Machine(type(gpu)(gpu.driver_name, (small + large) / 2 / USABLE, 3e12, 4e11, 5e10))
    (said,) = warnings(stages, 32, between, "bf16")
    assert "only in stage 1: the run would end in the middle" in said
    sizes = [peak_memory(changed(one.config, {"parallel.zero_stage": 3}), one.plans, 32, "bf16") for one in stages]
    assert f"parallel.zero_stage=3 ({file_size(max(sizes))})" in said
    assert max(sizes) == sizes[1] <= (small + large) / 2


def test_the_text_has_a_row_for_each_stage() -> None:
    config = example(24, 8192, *GRADUAL)
    text = render(make_plan(config, 32, MACHINE, 0.4, "bf16"), config, "plan of a growing run")
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(not line.endswith(" ") for line in text.splitlines())
    flat = " ".join(text.split())
    for part in (
        "stages 24 layers, 4.29 B parameters · midas after step 2,500: 28 layers",
        "last model 6,738,415,616 parameters",
        "3 msg 12,001 .. 32,000 83.9 B 32 4096 11008 32 6.74 B",
        "train the last model from the first step on as many tokens: +8.9 % over this run",
        "boundary not calibrated: ",
        "memory per rank, stage 3",
        "fixed, stage 1 4,001 .. 6,000 3",
        "3 kept, 8 milestones (every 4,000 steps) and 3 saves between stages",
    ):
        assert part in flat, part


def test_a_run_of_one_stage_has_no_table() -> None:
    config = load_config(EXAMPLES / "vanilla_7b.yaml", ["model.vocab_size=32000"])
    (only,) = plan_stages(config)
    assert (only.config, only.plans) == (config, {LoopPlan.empty(32)})
    plan = make_plan(config, 32, MACHINE, 0.4, "bf16")
    assert "stages" not in plan and "stage" not in plan["memory"] and "stage" not in plan["compute"][0]
