"""Every preset of a growing model trains, is stopped, goes on, and ends as the file's model, which is exported."""

from __future__ import annotations

from math import isfinite
from pathlib import Path

import pytest

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.forms import read_config
from megatron_sgt.config import load_config
from megatron_sgt.config.yaml_io import dump_yaml
from megatron_sgt.export.to_hf import ExportOptions, export_checkpoint
from megatron_sgt.stages.presets import GROWING, preset_named
from megatron_sgt.stages.stages import stages_of
from tests.helpers.exhaustive import share_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import TINY, measured_steps, pretrain, reported, write_tiny_data

SHARE = ["auto-prog", "sgt-g-stack-2"]
"""From an average of the weights; with loops."""


@pytest.mark.parametrize("preset", share_of(list(GROWING), SHARE))
def test_trains_is_stopped_goes_on_and_leaves(preset: str, tmp_path: Path) -> None:
    ours = {
        "model": {**TINY["model"], "num_layers": 8},
        "data": {**TINY["data"], "data_path": [write_tiny_data(tmp_path)], "data_cache_path": str(tmp_path / "cache")},
        "logging": {**TINY["logging"], "run_dir": str(tmp_path / "run")},
    }
    (tmp_path / "file.yaml").write_text(dump_yaml({**TINY, **ours}))
    stopped, whole = (
        load_config(tmp_path / "file.yaml", settings, preset_named(preset))
        for settings in (["train.exit_interval=7"], [])
    )
    stages, run_dir = stages_of(whole), tmp_path / f"run-{preset}"
    run_on_ranks(1, pretrain, stopped)
    run_on_ranks(1, pretrain, whole)
    steps = measured_steps(run_dir)
    assert [step["step"] for step in steps] == list(range(1, 19))
    assert all(isfinite(step["loss"]) for step in steps) and steps[-1]["loss"] < steps[0]["loss"]
    assert [(record["step"], record["operator"]) for record in reported(run_dir, "grow")] == [
        (stage.first, stage.grown.operator.name) for stage in stages if stage.grown is not None
    ]
    folder = layout.resolve(run_dir / "checkpoints")
    assert read_config(folder).model == stages[-1].config.model
    export = export_checkpoint(folder, tmp_path / "hf", options=ExportOptions(dtype="fp32", write_tokenizer=False))
    decided = {event["action"] for event in reported(run_dir, "growth")}
    assert ("first_selection" in decided) == preset.startswith("sgt")
    assert export.architecture == ("SGTForCausalLM" if preset.startswith("sgt") else "LlamaForCausalLM")
