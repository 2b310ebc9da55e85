from pathlib import Path

import pytest

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.reshard.layout_free import LayoutFreeReader
from megatron_sgt.checkpoint.reshard.sibling import layout_free_copy, remove_sibling, sibling_of
from megatron_sgt.errors import CheckpointError, LeaseError
from megatron_sgt.lease import beside
from tests.helpers.commands import snapshot
from tests.helpers.deepspeed_files import odd_config, random_state, write_checkpoint, write_manifest
from tests.helpers.fake_groups import fake_groups
from tests.helpers.leases import held_by_another


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = odd_config()
    return write_checkpoint(tmp_path, config, random_state(config), (2, 2, 1))


def test_a_copy_is_made_once_and_is_no_checkpoint_of_the_run(folder: Path) -> None:
    before = snapshot(folder)
    copy, how = layout_free_copy(folder, fake_groups())
    assert copy == sibling_of(folder) == folder.parent / f"{folder.name}.universal"
    assert how.startswith(f"converted into {copy} (") and " kB in 0." in how
    manifest.verify_sizes(copy)
    LayoutFreeReader(copy)
    made = snapshot(copy)
    assert layout_free_copy(folder, fake_groups()) == (copy, f"read from {copy}")
    assert snapshot(copy) == made and snapshot(folder) == before
    assert layout.finished_tags(folder.parent) == [folder.name]
    assert layout.resolve(copy) == copy


def test_a_damaged_copy_is_made_again(folder: Path) -> None:
    copy, _ = layout_free_copy(folder, fake_groups())
    whole = snapshot(copy)
    next(copy.glob("exp_avg_sq-*")).unlink()
    assert layout_free_copy(folder, fake_groups())[1].startswith("converted")
    assert snapshot(copy) == whole


def test_what_an_interrupted_conversion_left_is_written_over(folder: Path) -> None:
    temporary = folder.with_name(f"{folder.name}.universal.tmp")
    temporary.mkdir()
    (temporary / "weights-00001-of-00009.safetensors").touch()
    copy, _ = layout_free_copy(folder, fake_groups())
    assert not temporary.exists()
    assert not list(copy.glob("*-of-00009*"))
    temporary.mkdir()
    layout.clear_leftovers(folder.parent)
    assert not temporary.exists()


def test_the_copy_goes_with_its_checkpoint(folder: Path) -> None:
    remove_sibling(folder)
    copy, _ = layout_free_copy(folder, fake_groups())
    remove_sibling(folder)
    assert not copy.exists() and folder.exists()


def test_a_folder_that_takes_no_copy_names_the_tool(folder: Path) -> None:
    target = folder.with_name(f"{folder.name}.universal.tmp")
    target.symlink_to(folder / "nowhere" / "x")  # neither removed as a folder nor made as one
    with pytest.raises(CheckpointError, match=r"tools/reshard_checkpoint\.py --load .* set checkpoint\.load"):
        layout_free_copy(folder, fake_groups())


def test_a_checkpoint_that_cannot_be_converted_is_named(folder: Path) -> None:
    (folder / "mp_rank_01_model_states.pt").unlink()
    write_manifest(folder)
    with pytest.raises(CheckpointError, match="mp_rank_01_model_states"):
        layout_free_copy(folder, fake_groups())


def test_two_runs_that_convert_one_checkpoint_do_not_write_into_each_others_copy(folder: Path) -> None:
    copy = sibling_of(folder)
    going_on = copy.with_name(f"{copy.name}.tmp")
    going_on.mkdir()
    with held_by_another(beside(copy)) as other:
        with pytest.raises(LeaseError, match=rf"pid {other.pid}\b.*reshard_checkpoint"):
            layout_free_copy(folder, fake_groups())
        assert layout.clear_leftovers(folder.parent) == [] and going_on.exists(), "the other's"
    assert layout.clear_leftovers(folder.parent) == [going_on.name], "its writer was killed"
    assert not beside(copy).exists()
