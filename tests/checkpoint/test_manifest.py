"""Every change of a checkpoint's files is found by name: deleted, cut, one byte flipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.errors import CheckpointError
from tests.helpers.checkpoints import write_grown_checkpoint
from tests.helpers.damage import DAMAGES, damaged


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two tensor-parallel ranks."""
    return write_grown_checkpoint(tmp_path_factory.mktemp("whole"))


def test_a_whole_checkpoint_passes(folder: Path) -> None:
    assert manifest.checksum_problems(folder) == [] and manifest.size_problems(folder) == []
    manifest.verify_checksums(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_any_file_is_found(damage: str, folder: Path) -> None:
    names = [*layout.file_sizes(folder), layout.MANIFEST_FILE]
    assert len(names) == 9
    for name in names:
        with damaged(folder / name, damage):
            with pytest.raises(CheckpointError) as caught:
                manifest.verify_checksums(folder)
            assert name in str(caught.value), caught.value
    manifest.verify_checksums(folder)


def test_ranks_share_the_work(folder: Path) -> None:
    [name] = [n for n in layout.file_sizes(folder) if n == "mp_rank_01_model_states.pt"]
    with damaged(folder / name, "flip"):
        found = [manifest.checksum_problems(folder, part, 3) for part in range(3)]
    assert sorted(found) == [[], [], [f"{name} has changed since it was saved"]]


def test_sizes_alone_do_not_see_a_flipped_byte(folder: Path) -> None:
    with damaged(folder / "mp_rank_00_model_states.pt", "flip"):
        assert manifest.size_problems(folder) == []


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    for content in ({"files": {"a": 3}}, [], {"version": 1, "files": {}}):
        (tmp_path / layout.MANIFEST_FILE).write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged, or not of this version"):
            manifest.read_manifest(tmp_path)


def test_samples_see_another_file_of_the_same_size(folder: Path) -> None:
    name, other = (f"mp_rank_0{rank}_model_states.pt" for rank in (0, 1))
    assert manifest.sample_problems(folder) == [] and not manifest.without_samples(folder)
    with damaged(folder / name, "flip"):
        (folder / name).write_bytes((folder / other).read_bytes())
        if manifest.size_problems(folder) == []:
            assert manifest.sample_problems(folder) == [f"{name} is not the file that was saved"]
    with damaged(folder / name, "cut"):
        assert "bytes instead of" in manifest.sample_problems(folder)[0]


def test_the_name_of_a_run_is_that_of_its_newest_readable_checkpoint(tmp_path: Path) -> None:
    assert manifest.run_of(tmp_path / "absent") is None
    for step, run in ((1, "old"), (2, "new"), (3, "unreadable")):
        folder = tmp_path / layout.tag_for(step)
        folder.mkdir()
        manifest.write_manifest(folder, {"run": run})
    (folder / layout.MANIFEST_FILE).write_text("{")
    assert manifest.run_of(tmp_path) == "new"
