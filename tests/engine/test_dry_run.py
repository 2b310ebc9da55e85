"""The shape of a run as --dry-run prints it. What it refuses: tests/integration/test_user_errors.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.engine.dry_run import dry_run
from megatron_sgt.errors import CheckpointError, ConfigError, DataError
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.flops import overhead, step_flops
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.planning.structure import final_plan
from megatron_sgt.stages.stages import stages_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import pretrain, tiny_config, write_tiny_data
from tests.helpers.sentencepieces import UNLIKE_ANY, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def rows(text: str) -> dict[str, str]:
    """The table by its first column; notes joined."""
    table: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        table[name] = f"{table[name]}; {value.strip()}" if name in table else value.strip()
    return table


def test_the_shape_of_a_run(data: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "new", data, parallel={"tensor_model_parallel_size": 2})
    shown = rows(dry_run(config, 4))
    assert f"{parameter_count(config.model):,} parameters" in shown["model"]
    assert "5 layers" in shown["model"] and "4 heads in 4 groups" in shown["model"]
    assert "4 ranks = tensor parallel 2 x data parallel 2" in shown["layout"] and "fp32" in shown["layout"]
    assert "8 sequences = micro 2 x accumulation 2 x data parallel 2 · 128 tokens per step" in shown["batch"]
    flops = step_flops(config.model, LoopPlan.empty(5), 8).model * 18
    assert f"18 steps · 2,304 tokens · {flops:.3g} FLOPs before growth" in shown["run"]
    assert f"at most {100 * overhead(config.model, final_plan(config)):+.2f} % FLOPs" in shown["growth"]
    assert "120 documents" in shown["data"]
    assert shown["start"].startswith("FRESH START")
    assert not (tmp_path / "new").exists(), "a dry run leaves nothing behind"


@pytest.mark.parametrize("options, name", [({"byte_fallback": True}, "note"), ({}, "WARNING")], ids=["slow", "none"])
def test_a_tokenizer_that_an_export_cannot_keep_is_said(
    options: dict[str, Any], name: str, data: str, tmp_path: Path
) -> None:
    model = train(tmp_path / "m.model", **{**UNLIKE_ANY, **options})
    tokenizer = {"type": "sentencepiece", "model": str(model)}
    config = tiny_config(tmp_path / "new", data, data={"tokenizer": tokenizer}, model={"vocab_size": 512})
    shown = rows(dry_run(config, 1))
    assert "its special token 'Ω' is one character" in shown[name]
    assert ("--tokenizer none" in shown[name]) == (name == "WARNING")


def test_how_a_pipeline_cuts_the_model(data: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "new", data, parallel={"pipeline_model_parallel_size": 2})
    shown = rows(dry_run(config, 2))
    assert "pipeline parallel 2 x data parallel 1" in shown["layout"]
    assert "layers · largest stage over the mean +" in shown["pipeline"]
    assert "bubble of equal stages 20.0 %" in shown["pipeline"]


def test_the_stages_of_a_growing_model(data: str, tmp_path: Path) -> None:
    stages = [{"until_steps": 5, "operator": "g_stack", "options": {"factor": 2}}]
    config = tiny_config(tmp_path / "new", data, growth={"stages": stages})
    first, last = (stage.config for stage in stages_of(config))
    shown = rows(dry_run(config, 1))
    assert "5 layers" in shown["model"] and "g_stack after step 5: 10 layers" in shown["stages"]
    one, other = (step_flops(c.model, LoopPlan.empty(c.model.num_layers), 8).model for c in (first, last))
    assert f"{5 * one + 13 * other:.3g} FLOPs without loops" in shown["run"]
    assert f"at most {100 * overhead(last.model, final_plan(last)):+.2f} % FLOPs" in shown["growth"]
    assert "the largest, " in shown["checkpoint"]


def test_a_curriculum_of_lengths_has_a_row_and_its_flops(data: str, tmp_path: Path) -> None:
    entry = {"until_steps": 8, "seq_length": 4}
    config = tiny_config(tmp_path / "new", data, data={"seq_length_curriculum": [entry]})
    shown = rows(dry_run(config, 1))
    assert shown["lengths"] == "4 until step 8, then 16"
    full = step_flops(config.model, LoopPlan.empty(5), 8)
    flops = 3 * (18 * full.linear + (8 / 4 + 10) * full.attention)
    assert f"18 steps · 2,304 tokens · {flops:.3g} FLOPs before growth" in shown["run"]


def test_the_growth_row_of_the_baselines(data: str, tmp_path: Path) -> None:
    vanilla = tiny_config(tmp_path, data, growth={"method": "vanilla"})
    assert rows(dry_run(vanilla, 1))["growth"] == "none (vanilla)"
    block = tiny_config(tmp_path, data, growth={"method": "block_loop", "block_loop_layers": [2, 3]})
    assert "block loop of layers [2, 3]" in rows(dry_run(block, 1))["growth"]


def test_a_checkpoint_to_start_from_is_named(data: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data, train={"exit_interval": 2})
    run_on_ranks(1, pretrain, config)
    assert "global_step2" in rows(dry_run(config, 1))["start"]


@pytest.mark.parametrize(
    ("sections", "world_size", "kind", "message"),
    [
        ({}, 3, ConfigError, "batch sizes do not multiply"),
        ({"train": {"hooks": ["nowhere"]}}, 2, ConfigError, "'nowhere' of megatron_sgt.hooks"),
        ({"data": {"data_path": ["/nowhere/data"]}}, 1, DataError, "/nowhere/data"),
        ({"checkpoint": {"load": "/nowhere/there"}}, 1, CheckpointError, "no checkpoint at /nowhere/there"),
    ],
)
def test_the_first_thing_that_would_stop_the_run_is_raised(
    sections: dict[str, Any], world_size: int, kind: type[Exception], message: str, data: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        dry_run(tiny_config(tmp_path, data, **sections), world_size)
