"""A file that was saved as another's is refused, whatever the manifest says of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.identity import KEY, Identity, load_file
from megatron_sgt.errors import DamagedCheckpointError
from tests.helpers.checkpoints import write_plain_checkpoint


def stamped_file(folder: Path, step: int) -> Path:
    where = layout.read_json(folder / layout.STATE_FILE)["layout"]
    path = folder / layout.rng_file(0)
    torch.save(Identity(step, where, 0).stamped({"torch": torch.zeros(3)}, path), path)
    return path


def test_a_file_says_whose_it_is(tmp_path: Path) -> None:
    folder = write_plain_checkpoint(tmp_path / "global_step3")
    path = stamped_file(folder, 3)
    assert load_file(path)[KEY]["file"] == path.name
    other = path.with_name(layout.rng_file(1))
    shutil.copyfile(path, other)
    with pytest.raises(
        DamagedCheckpointError, match=r"00001\.pt .* says file rng_rank_00000\.pt instead of rng_rank_00001"
    ):
        load_file(other)
    stamped_file(folder, 2)
    with pytest.raises(DamagedCheckpointError, match="says step 2 instead of 3"):
        load_file(path)
    moved = write_plain_checkpoint(tmp_path / "global_step4", parallel={"zero_stage": 2}, deepspeed={})
    shutil.copyfile(stamped_file(folder, 4), moved / path.name)
    with pytest.raises(
        DamagedCheckpointError, match=r"says layout .*'zero_stage': 1.* instead of .*'zero_stage': [02]"
    ):
        load_file(moved / path.name)


def test_a_file_of_an_older_version_says_nothing(tmp_path: Path) -> None:
    torch.save({"torch": torch.zeros(3)}, tmp_path / "rng_rank_00000.pt")
    assert set(load_file(tmp_path / "rng_rank_00000.pt")) == {"torch"}


def test_an_identity_of_another_form_is_refused(tmp_path: Path) -> None:
    folder = write_plain_checkpoint(tmp_path / "global_step3")
    torch.save({KEY: 3}, folder / layout.rng_file(0))
    with pytest.raises(DamagedCheckpointError, match="is another file of a checkpoint"):
        load_file(folder / layout.rng_file(0))
