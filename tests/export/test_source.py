"""Reading any layout's checkpoint for export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_sgt.checkpoint.reshard.convert import convert
from megatron_sgt.checkpoint.reshard.rank_state import WEIGHTS
from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.source import find_checkpoint, open_checkpoint
from megatron_sgt.growth import LayerPlan, LoopPlan
from tests.helpers.checkpoints import grown_config, write_grown_checkpoint
from tests.helpers.deepspeed_files import odd_config, random_state, write_checkpoint
from tests.helpers.exports import write_run
from tests.helpers.single import small_config

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
