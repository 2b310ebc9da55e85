"""Shares of the weights: together they are the module, each rank's file holds its own, and none may be missing."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_sgt.checkpoint.host_copy import Arena
from megatron_sgt.checkpoint.layout import part_file
from megatron_sgt.checkpoint.shard_files import ShardFiles
from megatron_sgt.checkpoint.weight_parts import share
from megatron_sgt.errors import CheckpointError

NAME = "mp_rank_01_model_states.pt"


def module() -> OrderedDict[str, Tensor]:
    """Weights as ZeRO 1 has them: views of one flat buffer; and a buffer that is none, and an empty tensor."""
    flat, start, found = torch.arange(6000.0), 0, OrderedDict()
    for n, size in enumerate((2000, 900, 1500, 100, 1500)):
        found[f"layer.{n}"] = flat[start : start + size].view(-1, 10)
        start += size
    found["transposed"] = torch.arange(6, dtype=torch.bfloat16).view(2, 3).t()
    return found | {"step": torch.tensor(3), "empty": torch.empty(0, 4)}


def write(folder: Path, ranks: int, pinned: bool | None) -> None:
    """``pinned``: None: written at once; else kept for later."""
    for rank in range(ranks):
        files = ShardFiles(None if pinned is None else Arena(pinned), rank, ranks)
        weights = module()
        if rank == 0:
            files.save({"module": weights, "dp_world_size": ranks}, folder / NAME)
        else:
            files.save_share(weights, folder / NAME)
        for tensor in weights.values():
            tensor.zero_()  # what was kept is a copy
        assert list(files.finish()) == [NAME if rank == 0 else part_file(NAME, rank)]


@pytest.mark.parametrize("pinned", [None, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_is_read_is_what_was_written(ranks: int, pinned: bool | None, tmp_path: Path) -> None:
    write(tmp_path, ranks, pinned)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == ranks and max(sizes) < 4 * (6000 // ranks + 2000) + 8000
    files = ShardFiles()
    files.read([tmp_path / NAME])
    content = files.load(str(tmp_path / NAME))
    assert set(content) == {"module", "dp_world_size"}
    assert list(content["module"]) == list(module())
    for name, tensor in module().items():
        found = content["module"][name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_every_weight_has_one_owner_and_shares_are_even() -> None:
    weights = module()
    shares = [share(weights, rank, 3) for rank in range(3)]
    assert sorted(name for part in shares for name in part) == sorted(weights)
    assert all(share(weights, rank, 3).keys() == part.keys() for rank, part in enumerate(shares))
    loads = [sum(t.nbytes for t in part.values()) for part in shares]
    assert max(loads) - min(loads) <= 4 * 900


def test_a_missing_part_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, 2, None)
    part = tmp_path / part_file(NAME, 1)
    torch.save({}, part)
    with pytest.raises(CheckpointError, match=r"weights are missing: \['layer"):
        ShardFiles().read([tmp_path / NAME])
    part.unlink()
    with pytest.raises(CheckpointError, match=r"weights_0001_mp_rank_01\.pt cannot be read"):
        ShardFiles().read([tmp_path / NAME])
