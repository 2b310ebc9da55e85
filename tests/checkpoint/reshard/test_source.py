from pathlib import Path

import pytest
import torch

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.reshard.rank_state import QUANTITIES, WEIGHTS
from megatron_sgt.checkpoint.reshard.source import open_source
from megatron_sgt.errors import CheckpointError
from tests.helpers.deepspeed_files import STEP, odd_config, random_state, rank_state, stage_state, write_checkpoint


@pytest.mark.parametrize(
    ("where", "pipeline"),
    [
        ((2, 2, 0), None),
        ((2, 1, 1), None),
        ((1, 3, 2), None),
        ((4, 2, 3), None),
        ((2, 1, 0), (2, (3, 2))),
        ((1, 2, 1), (3, (1, 3, 1))),
        ((2, 2, 2), (2, (1, 1, 2, 1))),
    ],
)
def test_every_rank_of_every_stage_is_opened(
    where: tuple[int, int, int], pipeline: tuple[int, tuple[int, ...]] | None, tmp_path: Path
) -> None:
    config = odd_config(num_layers=5)
    state = random_state(config)
    source = open_source(write_checkpoint(tmp_path, config, state, where, pipeline=pipeline))
    assert source.step == STEP and source.tp_size == where[0]
    assert len(source.ranks) == source.pipeline.size == (1 if pipeline is None else pipeline[0])
    for stage, ranks in enumerate(source.ranks):
        for tp_rank, rank in enumerate(ranks):
            expected = stage_state(config, rank_state(config, state, where[0], tp_rank), source.pipeline, stage)
            assert rank.shapes.keys() == expected[WEIGHTS].keys()
            for quantity in QUANTITIES:
                for name, tensor in expected[quantity].items():
                    assert torch.equal(rank.read(name, quantity), tensor)


def test_a_stage_that_holds_another_ones_weights_is_named(tmp_path: Path) -> None:
    """As many layers on each, so that the order of the ranks alone is wrong."""
    config = odd_config(num_layers=4)
    folder = write_checkpoint(tmp_path, config, random_state(config), (1, 1, 0), pipeline=(2, (1, 1, 1, 1)))
    saved = layout.read_json(folder / layout.STATE_FILE)
    for counts, said in (
        ([2, 2], r"unexpected parameters or shapes in stage 0 of the pipeline: \['gpt\.decoder\.layers\.1\."),
        ([1, 1, 1, 2], "the stages of its pipeline hold 5 layers, its model has 4"),
    ):
        saved["layout"][layout.PIPELINE_COUNTS] = counts
        layout.write_json(folder / layout.STATE_FILE, saved)
        with pytest.raises(CheckpointError, match=said):
            open_source(folder)


def test_a_stage_at_another_step_is_noticed(tmp_path: Path) -> None:
    config = odd_config()
    folder = write_checkpoint(tmp_path, config, random_state(config), (1, 1, 0), pipeline=(2, (1, 1)))
    file = folder / layout.model_file(1)
    content = torch.load(file)
    for state in content["optimizer"]["state"].values():
        state["step"] += 1
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=rf"differ in their AdamW step \(\[{STEP}, {STEP + 1}\]\)"):
        _ = open_source(folder).step


def test_files_of_bf16_have_another_name(tmp_path: Path) -> None:
    config = odd_config()
    folder = write_checkpoint(tmp_path, config, random_state(config), (1, 2, 1))
    for file in folder.glob("zero_*_optim_states.pt"):
        file.rename(file.with_name(f"bf16_{file.name}"))
    saved = layout.read_json(folder / layout.STATE_FILE)
    saved["layout"]["precision"] = "bf16"
    layout.write_json(folder / layout.STATE_FILE, saved)
    assert open_source(folder).step == STEP


def test_what_cannot_be_converted_is_named(tmp_path: Path) -> None:
    config = odd_config()
    folder = write_checkpoint(tmp_path, config, random_state(config), (1, 1, 0))
    file = folder / "mp_rank_00_model_states.pt"
    content = torch.load(file)
    torch.save({**content, "module": {}}, file)
    with pytest.raises(CheckpointError, match=r"lack something that version 0\.19 writes.*KeyError"):
        open_source(folder)
    (folder / layout.CONFIG_FILE).write_text(odd_config(num_layers=3).to_yaml())
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"unexpected parameters or shapes: \['gpt\.decoder\.layers\.2"):
        open_source(folder)


def test_a_layout_free_checkpoint_is_no_source(tmp_path: Path) -> None:
    config = odd_config()
    folder = write_checkpoint(tmp_path, config, random_state(config), (1, 1, 0))
    saved = layout.read_json(folder / layout.STATE_FILE)
    free = {"version": 1, "source_layout": saved["layout"], "optimizer_step": STEP, "loss_scale": None}
    layout.write_json(folder / layout.STATE_FILE, {**saved, "layout": None, "layout_free": free})
    with pytest.raises(CheckpointError, match="layout-free already"):
        open_source(folder)
