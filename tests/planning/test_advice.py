"""Warnings: each appears when it should, names a change, and is silent otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sgt.config import Config, load_config
from megatron_sgt.metrics.units import file_size
from megatron_sgt.planning.advice import changed, warnings
from megatron_sgt.planning.hardware import USABLE, find_gpu
from megatron_sgt.planning.parameters import parameter_count, stage_parameter_count
from megatron_sgt.planning.rank_memory import peak_memory
from megatron_sgt.planning.stages import plan_stages
from megatron_sgt.planning.step_time import Machine
from megatron_sgt.planning.structure import timeline

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"
H100 = Machine(find_gpu("h100"))


def example(name: str, *overrides: str) -> Config:
    return load_config(EXAMPLES / f"{name}.yaml", ["model.vocab_size=32000", *overrides])


@pytest.mark.parametrize(("name", "ranks"), [("sgt_300m", 8), ("sgt_1.2b", 8), ("sgt_7b", 32), ("sgt_70b", 256)])
def test_the_examples_need_no_warning_on_the_machines_they_name(name: str, ranks: int) -> None:
    assert list(warnings(plan_stages(example(name)), ranks, H100, "bf16")) == []


@pytest.mark.parametrize(
    ("name", "overrides", "ranks", "texts"),
    [
        ("sgt_7b", ["growth.first_selection_step=32000"], 32, ["nothing grows", "growth.method=vanilla"]),
        ("sgt_7b", ["train.train_iters=3400"], 32, ["reach step 4,000", "growth.window_size=800"]),
        ("sgt_7b", ["parallel.loop_method=owner"], 32, ["does 2 times the mean", "loop_method=balanced"]),
        ("sgt_7b", ["parallel.sequence_parallel=false"], 32, ["sequence_parallel=true", "half"]),
        ("sgt_7b", ["parallel.zero_stage=2"], 32, ["each of 64 micro-batches", "zero_stage=1"]),
        (
            "sgt_300m",
            ["parallel.zero_stage=3", "train.micro_batch_size=1"],
            128,
            ["98,816 elements", "ZeRO-3"],
        ),
        (
            "vanilla_300m",
            ["parallel.zero_stage=0", "train.precision=fp32"],
            8,
            ["ZeRO-0 keeps", "matrix units"],
        ),
        ("sgt_70b", ["parallel.tensor_model_parallel_size=8"], 256, ["reaches over nodes of 4"]),
        ("sgt_7b", ["checkpoint.save_interval=0"], 32, ["saves only at the end"]),
        (
            "sgt_1.2b",
            ["parallel.pipeline_model_parallel_size=4", "train.global_batch_size=8", "train.micro_batch_size=1"],
            4,
            ["8 micro-batches through 4 pipeline stages", "27 % of a step"],
        ),
        (
            "sgt_1.2b",
            ["parallel.pipeline_model_parallel_size=4", "parallel.pipeline_model_parallel_layout='6,6,6,6'"],
            4,
            ["the largest of the pipeline stages 6,6,6,6 does", "(auto) leaves"],
        ),
    ],
)
def test_each_warning_names_its_numbers_and_the_way_out(
    name: str, overrides: list[str], ranks: int, texts: list[str]
) -> None:
    node = 4 if "nodes of 4" in texts[0] else 8
    said = " | ".join(warnings(plan_stages(example(name, *overrides)), ranks, Machine(find_gpu("h100"), node), "bf16"))
    for text in texts:
        assert text in said, said


def test_what_does_not_fit_is_told_with_changes_that_fit() -> None:
    config = example("sgt_1.2b", "train.micro_batch_size=10", "train.global_batch_size=640")
    (said,) = warnings(plan_stages(config), 8, H100, "bf16")
    assert said.startswith("does not fit: ") and "from the start" in said
    assert "train.micro_batch_size=5 (" in said and "train.recompute_granularity=full (" in said
    plans = [stretch.plan for stretch in timeline(config)]
    for change in ({"train.micro_batch_size": 5}, {"train.recompute_granularity": "full"}):
        assert peak_memory(changed(config, change), plans, 8, "bf16") <= USABLE * 80e9


def test_where_no_single_change_is_enough_that_is_said() -> None:
    (said, *_) = warnings(plan_stages(example("sgt_70b")), 8, H100, "bf16")
    assert "no single change is enough" in said


def test_growth_that_bursts_the_memory_is_told_beforehand() -> None:
    """A device that holds the run before growth, and not in a window."""
    config = example("sgt_1.2b")
    plans = [stretch.plan for stretch in timeline(config)]
    before, worst = (peak_memory(config, some, 8, "bf16") for some in (plans[:1], plans))
    gpu = find_gpu("h100")
    between = Machine(type(gpu)(gpu.driver_name, (before + worst) / 2 / USABLE, 3e12, 4e11, 5e10))
    assert "only after growth" in next(iter(warnings(plan_stages(config), 8, between, "bf16")))


def pipeline(stages: int, *overrides: str) -> str:
    """All that is said of few micro-batches through ``stages`` stages."""
    few = ["train.global_batch_size=12", "train.micro_batch_size=1", f"parallel.pipeline_model_parallel_size={stages}"]
    return " | ".join(warnings(plan_stages(example("sgt_1.2b", *few, *overrides)), stages, H100, "bf16"))


def test_more_chunks_are_advised_where_the_rules_take_them() -> None:
    assert "parallel.virtual_pipeline_model_parallel_size=2" in pipeline(6)
    assert "virtual_pipeline" not in pipeline(8)  # 12 micro-batches are no multiple of 8 stages
    assert "virtual_pipeline" not in pipeline(6, "parallel.pipeline_model_parallel_layout='4,4,4,4,4,4'")


def test_zero_0_is_told_the_state_of_the_largest_stage() -> None:
    said = {}
    for stages in (1, 2):
        overrides = ["parallel.zero_stage=0", "train.precision=fp32"]
        overrides.append(f"parallel.pipeline_model_parallel_size={stages}")
        config = example("sgt_300m", *overrides, "growth.method=vanilla")
        said[stages] = " | ".join(warnings(plan_stages(config), 8, H100, "fp32"))
    config = example("sgt_300m", *overrides)
    largest = max(stage_parameter_count(config, stage) for stage in range(2))
    assert f"ZeRO-0 keeps {file_size(8 * largest)} of" in said[2]
    assert f"ZeRO-0 keeps {file_size(8 * parameter_count(config.model))} of" in said[1]


def test_no_zero_3_is_advised_to_a_pipeline() -> None:
    settings = ["parallel.pipeline_model_parallel_size=2", "parallel.zero_stage=1"]
    said = " | ".join(warnings(plan_stages(example("sgt_70b", *settings)), 16, H100, "bf16"))
    assert "no single change is enough" in said and "ZeRO-3" not in said
