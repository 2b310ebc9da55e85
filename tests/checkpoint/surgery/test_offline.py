"""Grown checkpoints on disk: whole or not at all, with what a run needs to go on."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.find import check_checkpoint
from megatron_sgt.checkpoint.reshard.layout_free import LayoutFreeReader
from megatron_sgt.checkpoint.reshard.rank_state import WEIGHTS
from megatron_sgt.checkpoint.surgery import offline
from megatron_sgt.checkpoint.surgery.offline import GrownCheckpoint, grow_checkpoint
from megatron_sgt.config import load_config
from megatron_sgt.config.growth import RampConfig
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.export.architecture import plain_architecture
from megatron_sgt.export.from_hf import import_model
from megatron_sgt.export.hf.loading import load_exported
from megatron_sgt.export.parity import check_parity
from megatron_sgt.export.to_hf import ExportOptions, export_checkpoint
from megatron_sgt.growth import LoopPlan
from megatron_sgt.preflight import find_start
from megatron_sgt.stages.operators import OPERATORS
from tests.helpers.checkpoints import write_grown_checkpoint
from tests.helpers.commands import snapshot
from tests.helpers.deepspeed_files import STEP, odd_config, random_state, write_checkpoint
from tests.helpers.hf_folders import build_hf_model, save_hf_model


def grow(load: Path, output: Path, name: str, options: dict[str, Any], **how: Any) -> GrownCheckpoint:
    return grow_checkpoint(load, output, OPERATORS[name], options, **how)


def test_the_run_goes_on_from_the_grown_checkpoint(tmp_path: Path) -> None:
    root, output = tmp_path / "old", tmp_path / "new"
    folder = write_grown_checkpoint(root, (2, 1, 1))
    (root / layout.PASSED_FILE).write_text('{"ranges": [[8, 16]]}')
    before = snapshot(root)
    done = grow(root, output, "g_stack", {"factor": 2}, moments="copy", optimizer="continue")
    assert snapshot(root) == before
    assert sorted(p.name for p in output.iterdir()) == sorted(
        ["config.yaml", folder.name, "latest", layout.ITERATION_FILE, layout.PASSED_FILE]
    )
    manifest.verify_checksums(done.folder)
    config = load_config(done.config_file)
    assert (config.model.num_layers, config.checkpoint.load) == (8, str(output))
    start = find_start(config)  # also that model and growth fit
    assert start.folder == done.folder and start.saved["trainer"]["consumed_samples"] == 2 * STEP
    assert layout.read_json(output / layout.PASSED_FILE) == {"ranges": [[8, 16]]}
    assert manifest.read_manifest(done.folder)["layout"] is None
    assert len(list(done.folder.glob("rng_rank_*.pt"))) == 2
    made = start.saved["layout_free"]
    assert made["optimizer_step"] == STEP and made["stage"] == done.stage == 1
    again = grow(output, tmp_path / "third", "midas", {"block_size": 4})
    assert again.stage == 2 and load_config(again.config_file).model.num_layers == 12
    actions = [e["action"] for e in find_start(load_config(again.config_file)).saved["hooks"]["growth"]["events"]]
    assert actions == ["grow", "grow"]


def test_a_checkpoint_of_a_pipeline_grows_like_any_other(tmp_path: Path) -> None:
    config, made = odd_config(num_layers=3), []
    for name, pipeline in (("one", None), ("stages", (2, (1, 2)))):
        folder = write_checkpoint(tmp_path / name, config, random_state(config), (2, 1, 0), pipeline=pipeline)
        made.append(grow(folder, tmp_path / f"grown-{name}", "midas", {"block_size": 3}, moments="copy").folder)
    for file in made[0].glob("*.safetensors"):
        assert file.read_bytes() == (made[1] / file.name).read_bytes()
    states = [layout.read_json(folder / layout.STATE_FILE)["layout_free"] for folder in made]
    assert states[1]["source_layout"][layout.PIPELINE_COUNTS] == [1, 2], "of the model before growth"
    assert len(list(made[1].glob("rng_rank_*.pt"))) == 4


def test_without_moments_nothing_is_written_for_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old", odd_config(), random_state(odd_config()), (1, 1, 0))
    done = grow(tmp_path / "old", tmp_path / "new", "g_stack", {"factor": 2})
    assert not list(done.folder.glob("exp_avg*")) and done.carried.step == 0
    reader = LayoutFreeReader(done.folder)
    assert reader.quantities == (WEIGHTS,)
    (note,) = done.notes
    assert note.startswith(f"AdamW starts anew, but the learning rate goes on at step {STEP} of its curve; ")
    check_checkpoint(done.folder, load_config(done.config_file))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_an_imported_model_grows_and_leaves_again(name: str, tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", name)
    import_model(tmp_path / "hf", tmp_path / "in")
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "ffn_hidden_size": 64, "num_layers": 4}
    done = grow(tmp_path / "in", tmp_path / "new", "msg", sizes)
    options = ExportOptions(dtype="fp32", write_tokenizer=False)
    export = export_checkpoint(tmp_path / "new", tmp_path / "out", options=options)
    assert export.architecture == {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[name]
    parity = check_parity(export, new_tokens=4)
    assert parity.passed, parity.checks
    tokens = torch.arange(40).view(2, 20) * 7 % 96
    with torch.no_grad():
        gap = load_exported(tmp_path / "out", torch.float32, False)(tokens).logits - build_hf_model(name)(tokens).logits
    assert float(gap.abs().max()) < 2e-5, "the model of the folder still"
    assert done.carried.step == 0 and find_start(load_config(done.config_file)).folder == done.folder


def test_heads_that_do_not_divide_the_width_leave_as_sgt() -> None:
    growth = OPERATORS["msg"](odd_config(qk_layernorm=False).model, {"hidden_size": 26})
    assert plain_architecture(growth.old, LoopPlan.empty(2))[0] == "LlamaForCausalLM"
    assert plain_architecture(growth.new, LoopPlan.empty(2)) == (
        None,
        "transformers wants heads to divide hidden_size 26",
    )


def test_a_ramp_goes_on_in_the_run_and_cannot_be_left_or_grown_over(tmp_path: Path) -> None:
    write_grown_checkpoint(tmp_path / "old", (1, 1, 1))
    done = grow(tmp_path / "old", tmp_path / "new", "msg", {"num_layers": 5, "ramp_steps": 9})
    assert "the model is faded in until step 16: set train.train_iters to that at least" in done.notes
    config = load_config(done.config_file, ["train.train_iters=16"])
    assert config.growth.ramp == RampConfig(first=STEP, steps=9, layers=(4,))
    assert find_start(config).folder == done.folder
    with pytest.raises(CheckpointError, match=r"at step 7, and growth\.ramp is \{'first': 7, .*\} there and null here"):
        find_start(load_config(done.config_file, ["growth.ramp=null", "train.train_iters=16"]))
    with pytest.raises(ConfigError, match=r"faded in until step 16 and cannot grow again after step 7"):
        grow(tmp_path / "new", tmp_path / "third", "g_stack", {"factor": 2})
    assert not (tmp_path / "third").exists()


def test_what_cannot_grow_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "old", odd_config(), random_state(odd_config()), (1, 1, 0))
    old, new = tmp_path / "old", tmp_path / "new"
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="no multiple of block_size 4"):
        grow(old, new, "midas", {})
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        grow(tmp_path / "nowhere", new, "g_stack", {})
    with pytest.raises(CheckpointError, match="old exists already"):
        grow(old, old, "g_stack", {})
    monkeypatch.setattr(offline.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"takes about .* but .* has 1\.00 kB free"):
        grow(old, new, "g_stack", {})
    monkeypatch.undo()

    def killed(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "commit_folder", killed)
    with pytest.raises(CheckpointError, match=r"new cannot be written: .* No space left"):
        grow(old, new, "g_stack", {})
    assert snapshot(tmp_path) == before


def test_a_leftover_of_a_killed_attempt_is_no_obstacle(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old", odd_config(), random_state(odd_config()), (1, 1, 0))
    shutil.copytree(tmp_path / "old", tmp_path / "new.tmp")
    grow(tmp_path / "old", tmp_path / "new", "g_stack", {"factor": 2})
    assert not (tmp_path / "new.tmp").exists()
