"""Reading any layout's checkpoint for export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_sgt.checkpoint.reshard.convert import convert
from megatron_sgt.checkpoint.reshard.rank_state import WEIGHTS
from megatron_sgt.config.growth import RampConfig
from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.hf.loading import load_exported
from megatron_sgt.export.hf.open_model import open_model
from megatron_sgt.export.parity import check_parity
from megatron_sgt.export.source import find_checkpoint, open_checkpoint
from megatron_sgt.export.to_hf import ExportOptions, export_checkpoint
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.model.hf_weights import megatron_shard
from megatron_sgt.model.ramp import RampMask
from tests.helpers.checkpoints import grown_config, write_grown_checkpoint
from tests.helpers.deepspeed_files import STEP, odd_config, random_state, write_checkpoint
from tests.helpers.exports import export_config, mild_state, write_run
from tests.helpers.fake_groups import fake_groups
from tests.helpers.single import single_model, small_config

LAYOUTS = [(1, 1, 0), (2, 2, 0), (2, 1, 1), (4, 2, 2), (1, 3, 3), (2, 2, 3)]


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("keep_padding", [False, True])
def test_reads_whole_tensors_of_every_layout(tmp_path: Path, where: tuple[int, int, int], keep_padding: bool) -> None:
    config = odd_config()
    state = random_state(config)
    write_checkpoint(tmp_path, config, state, where)
    _add_counters(tmp_path)
    source = open_checkpoint(tmp_path, keep_padding=keep_padding)
    rows = 24 if keep_padding else 21
    found = {name: t for weight in source.weights() for name, t in source.read(weight)[0].items()}
    assert list(found) == list(source.names) and source.vocab_rows == rows
    for name, tensor in found.items():
        expected = state[WEIGHTS][name]
        expected = expected[:rows] if name in ("model.embed_tokens.weight", "lm_head.weight") else expected
        assert torch.equal(tensor, expected) and source.names[name] == tuple(expected.shape), name


def test_reads_layout_free_checkpoints(tmp_path: Path) -> None:
    folder = write_grown_checkpoint(tmp_path / "a", (2, 2, 3))
    convert(folder, tmp_path / "b")
    one, other = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")
    assert one.names == other.names
    for weight in one.weights():
        left, right = one.read(weight)[0], other.read(weight)[0]
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_finds_the_step_that_is_asked_for(tmp_path: Path) -> None:
    folder = write_grown_checkpoint(tmp_path)
    assert find_checkpoint(tmp_path) == find_checkpoint(folder) == find_checkpoint(tmp_path, 7) == folder
    with pytest.raises(CheckpointError, match=f"no checkpoint of step 8 in {tmp_path}; there are: {folder.name}"):
        find_checkpoint(tmp_path, 8)


@pytest.mark.parametrize("name", ["sgt_state.json", "config.yaml", "zero_pp_rank_0_mp_rank_01_optim_states.pt"])
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    """Also where the sizes are right: a file of another kind of the same length."""
    folder = write_grown_checkpoint(tmp_path)
    size = (folder / name).stat().st_size
    (folder / name).write_bytes(b"?" * size)
    with pytest.raises(CheckpointError, match=f"{name} has changed since it was saved"):
        open_checkpoint(tmp_path)


def test_plans_with_and_without_the_gates_of_training(tmp_path: Path) -> None:
    source = open_checkpoint(write_grown_checkpoint(tmp_path))
    layers = grown_config().model.num_layers
    at_use = LoopPlan(layers, ((3, LayerPlan(2, (0, 3))), (1, LayerPlan(1, (1, 2)))))
    in_window = LoopPlan(layers, ((3, LayerPlan(2, (0, 3))), (1, LayerPlan(1, (1, 2), 0.5))))
    assert source.plan() == at_use
    assert source.plan(training_gates=True) == in_window


def test_a_block_loop_is_the_plan(tmp_path: Path) -> None:
    settings = {"method": "block_loop", "block_loop_layers": [2], "block_loop_count": 3}
    write_run(tmp_path, small_config(growth=settings))
    assert open_checkpoint(tmp_path).plan() == LoopPlan(4, ((2, LayerPlan(block_loops=3)),))


def _add_counters(root: Path) -> None:
    """What a run's state has and the bare files of ``write_checkpoint`` have not."""
    import json

    from tests.helpers.deepspeed_files import write_manifest

    (folder,) = root.glob("global_step*")
    path = folder / "sgt_state.json"
    state = json.loads(path.read_text())
    state["trainer"] |= {"consumed_samples": 14, "skipped_steps": 0, "consecutive_skipped": 0}
    path.write_text(json.dumps(state))
    write_manifest(folder)


def test_a_mask_is_in_the_weights_that_leave(tmp_path: Path) -> None:
    """Inside a ramp: an export computes what the run's masked model does, loops of a new layer too, and says so."""
    ramp = {"first": STEP - 1, "steps": 4, "layers": [2, 3], "old_units": 60}
    config = export_config("biases")
    config = config.model_copy(update={"growth": config.growth.model_copy(update={"ramp": RampConfig(**ramp)})})
    write_run(tmp_path / "ckpt", config, (2, 1, 1))
    export = export_checkpoint(tmp_path / "ckpt", tmp_path / "out", options=ExportOptions(dtype="fp32"))
    parity = check_parity(export, new_tokens=4)
    assert export.source.mask == 0.25 and parity.passed, parity.checks
    assert "faded in until step 10; the mask of this step, 0.25, is in the weights" in (
        export.folder / "README.md"
    ).read_text(encoding="utf-8")
    model = single_model(config).eval()
    model.gpt.load_state_dict(megatron_shard(mild_state(config)[WEIGHTS], config.model), strict=False)
    apply_plan(model, export.plan)
    tokens = torch.arange(40).view(2, 20) * 7 % 128
    mask = RampMask(model, config, fake_groups())
    with torch.no_grad():
        found = load_exported(export.folder, torch.float32, True)(tokens, use_cache=False).logits
        opened = open_model(tmp_path / "ckpt").model(tokens, use_cache=False).logits
    assert torch.equal(opened, found)
    gaps = []
    for value in (0.25, 0.3, 1.0):
        mask.set(value)
        gaps.append(float((model.logits(tokens) - found).abs().max()))
    assert gaps[0] <= 1e-4 and min(gaps[1:]) > 1e-2
