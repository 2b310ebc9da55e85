"""Pipelines that no run can have: one line with the user's own values and the fix, exit code 2, nothing written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sgt.config import load_config
from megatron_sgt.planning.pipeline import pipeline_layout
from megatron_sgt.submit.job import write_job
from tests.helpers.commands import run_script, snapshot
from tests.helpers.edges import refused
from tests.launch.test_sbatch import JOB

CONFIG = """\
model: {num_layers: 4, hidden_size: 32, num_attention_heads: 4, ffn_hidden_size: 48, seq_length: 16, vocab_size: 64}
parallel: {device: cpu}
optim: {lr: 1e-3}
train: {train_iters: 4, micro_batch_size: 2, global_batch_size: 4}
data: {data_path: data/walk}
"""
TWO, VIRTUAL = "pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"
GROWS = "growth.stages=[{until_steps: 2, operator: g_stack, options: {factor: 2}}]"


def layout(text: str) -> str:
    return f"pipeline_model_parallel_layout={text}"


REFUSED: dict[str, tuple[list[str], str]] = {
    "ZeRO-3": ([TWO, "zero_stage=3"], "zero_stage: 3 with pipeline_model_parallel_size 2 .* use zero_stage 2 or 1"),
    "fp16": ([TWO, "device=auto", "train.precision=fp16"], "2 with train.precision fp16 was never run.* use bf16"),
    "overlapped reduction of virtual parts": (
        [TWO, VIRTUAL, "deepspeed.zero_optimization.overlap_comm=true"],
        "overlap_comm: true with virtual_pipeline_model_parallel_size 2 .* leave it out",
    ),
    "offloaded gradients of virtual parts": (
        [TWO, VIRTUAL, "zero_stage=2", "deepspeed.zero_optimization.offload_optimizer={device: cpu}"],
        "zero_stage: 2 with virtual_pipeline_model_parallel_size 2 and offload_optimizer .* zero_stage 1, or no v",
    ),
    "backward passes that nobody counts": (
        [TWO, "deepspeed.managed_gradient_accumulation=false"],
        "managed_gradient_accumulation: false with pipeline_model_parallel_size 2 .* leave it out",
    ),
    "deeper than the model": (
        ["pipeline_model_parallel_size=8"],
        "pipeline_model_parallel_size: 8 needs a layer for each part, the model has 4 layers; use fewer parts$",
    ),
    "more virtual parts than layers": (
        [TWO, "virtual_pipeline_model_parallel_size=4"],
        "2 x virtual_pipeline_model_parallel_size 4 needs a layer for each part, the model has 4 layers; use fewer",
    ),
    "virtual parts alone": ([VIRTUAL], "virtual.*: 2 needs pipeline_model_parallel_size above 1, got 1"),
    "a layout alone": ([layout("Ett|ttL")], "layout: has no effect with pipeline_model_parallel_size 1"),
    "deeper than the first model of a run that grows": (
        ["pipeline_model_parallel_size=8", GROWS],
        r"8 needs a layer for each part, the first model of growth\.stages \(growth stage 0\) has 4 layers; use fewer "
        "parts, or another preset or stages that begin with at least 8 layers$",
    ),
    "another sum": ([TWO, layout("Et*4|tL")], r"'Et\*4\|tL': its parts hold 4 \+ 1 = 5 layers, the model 4"),
    "another number of parts": ([TWO, layout("[1, 2, 1]")], r"\[1, 2, 1\]: it has 3 parts for 2 stages"),
    "a list with another sum": (
        [TWO, layout("[[embedding, decoder], [decoder, loss]]")],
        r"layout: \[\['embedding', 'decoder'\], \['decoder', 'loss'\]\]: its parts hold 1 \+ 1 = 2 layers, the model 4",
    ),
    "too few virtual parts": (
        [TWO, VIRTUAL, layout("2,2")],
        "'2,2': it has 2 parts for 2 stages x 2 chunks = 4",
    ),
    "an empty part": ([TWO, layout("E|tttt L")], "part 0 has no layer; every part needs one"),
    "another letter": ([TWO, layout("Ett|ttmL")], r"'Ett\|ttmL': 'm' is none of E \(embedding\), t \(a layer\), L"),
    "no output layer": ([TWO, layout("Ett|tt")], "must begin with the embedding, end with the output"),
    "no notation": ([TWO, layout("[E, t]")], r"must be auto, Megatron-Core's string .* got \['E', 't'\]"),
    "a number": ([TWO, layout("3")], "must be auto, .* got 3"),
    "a mapping": ([TWO, layout("{}")], "must be auto, .* got {}"),
    "without end": ([TWO, layout("E(t*9999)*9999|tL")], "longer than 100,000 with its repetitions"),
    "very long": ([TWO, layout("E" + "t" * 110_000)], r"'Ettt+\.\.\.t+': it is longer than 100,000"),
    "of a model that grows": (
        [TWO, layout("3,1"), GROWS],
        r"growth\.stages\[0\]: .*layout: '3,1' cuts 4 layers, and the model grows to 8; set auto",
    ),
    "ranks": (
        ["tensor_model_parallel_size=4", TWO],
        "tensor_model_parallel_size 4 x pipeline_model_parallel_size 2 = 8 does not divide the 2 processes",
    ),
    "micro-batches of virtual parts": (
        [TWO, VIRTUAL, "train.global_batch_size=6"],
        r"multiple of pipeline_model_parallel_size 2 micro-batches in a step, got accumulation 3 = global_batch_size 6 "
        r"/ \(micro 2 x data parallel 1\); nearest global_batch_size that works: 8",
    ),
    "the name of another project": (["pipe_parallel_size=2"], "did you mean 'parallel.pipeline_model_parallel_size'"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "run.yaml").write_text(CONFIG)
    return folder


def settings(names: list[str]) -> list[str]:
    """With the section of those that have none."""
    return [name if "." in name.partition("=")[0] else f"parallel.{name}" for name in names]


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_before_anything_else(case: str, folder: Path) -> None:
    given, said = REFUSED[case]
    before = snapshot(folder)
    arguments = ["--config", "run.yaml", "--dry-run", "--world-size", "2", *settings(given)]
    refused(run_script("pretrain_sgt.py", arguments, folder), 2, said)
    assert snapshot(folder) == before


NOTATIONS = ["Et*3|tL", "E(t)*3 | tL", "3,1", "[3, 1]", "[[embedding, decoder, decoder, decoder], [decoder, loss]]"]


@pytest.mark.parametrize("text", NOTATIONS)
def test_every_notation_passes_a_command_line_and_a_job(text: str, folder: Path, tmp_path: Path) -> None:
    """The job reads the resolved configuration, so that no shell sees | * ( )."""
    config = load_config(folder / "run.yaml", settings([TWO, layout(text)]))
    assert pipeline_layout(config).counts == (3, 1)
    script = write_job(replace(JOB, folder=str(tmp_path / "job")), config)
    assert load_config(script.parent / "config.yaml") == config
    assert "Et" not in script.read_text()
