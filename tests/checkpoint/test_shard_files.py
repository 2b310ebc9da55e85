"""What DeepSpeed writes and reads through: no error inside DeepSpeed, no file that was not asked for, no code."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint.host_copy import Arena
from megatron_sgt.checkpoint.layout import model_file
from megatron_sgt.checkpoint.manifest import describe_file
from megatron_sgt.checkpoint.shard_files import ShardFiles, redirected_to
from megatron_sgt.errors import CheckpointError


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("arena", [None, Arena(pinned=False)])
def test_files_are_described_by_the_rank_that_wrote_them(arena: Arena | None, tmp_path: Path) -> None:
    files = ShardFiles(arena)
    for name in ("a.pt", "b.pt"):
        files.save({"x": torch.ones(3), "name": name}, str(tmp_path / name))
    assert (tmp_path / "a.pt").exists() == (arena is None)
    assert files.finish() == {name: describe_file(tmp_path / name) for name in ("a.pt", "b.pt")}


@pytest.mark.parametrize("arena", [None, Arena(pinned=False)])
def test_the_first_failure_is_told_at_the_end(arena: Arena | None, tmp_path: Path) -> None:
    files = ShardFiles(arena)
    files.save({}, tmp_path / "absent" / "a.pt")
    files.save({}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="absent"):
        files.finish()
    assert not (tmp_path / "b.pt").exists()


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"module": {}, "trap": Trap(tmp_path / "executed")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt holds code \(posix\.mkdir\), not loaded"):
        ShardFiles().read([tmp_path / "a.pt"])
    assert not (tmp_path / "executed").exists()


def test_deepspeed_gets_what_was_read_before(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save({"name": name}, tmp_path / name)
    files, engine = ShardFiles(), SimpleNamespace(checkpoint_engine="DeepSpeed's own")
    files.read([tmp_path / "a.pt"])
    stand_in: Any = engine
    with redirected_to(files, stand_in):
        (tmp_path / "a.pt").unlink()
        for name in ("a.pt", "b.pt"):
            assert engine.checkpoint_engine.load(str(tmp_path / name), map_location="cpu") == {"name": name}
        torch.save({"trap": Trap(tmp_path / "executed")}, tmp_path / "c.pt")
        with pytest.raises(CheckpointError, match="mkdir"):
            engine.checkpoint_engine.load(str(tmp_path / "c.pt"))
    assert engine.checkpoint_engine == "DeepSpeed's own"
    assert vars(engine).keys() == {"checkpoint_engine"}


def test_each_of_many_ranks_finds_its_own_file(tmp_path: Path) -> None:
    """DeepSpeed's engine takes the n-th name of its list for rank n."""
    from deepspeed import DeepSpeedEngine

    engine = object.__new__(DeepSpeedEngine)
    torch.nn.Module.__init__(engine)
    engine.__dict__.update(checkpoint_engine=None, zero_optimization_partition_weights=lambda: False)
    engine.__dict__.update(load_universal_checkpoint=lambda: False)
    names = [str(tmp_path / "tag" / model_file(rank)) for rank in range(128)]
    (tmp_path / "tag").mkdir()
    for name in names:
        Path(name).touch()
    assert engine._get_all_ckpt_names(str(tmp_path), "tag") != names
    with redirected_to(ShardFiles(), engine):
        assert engine._get_all_ckpt_names(str(tmp_path), "tag") == names
