"""Reading exported folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.hf.loading import ExportedTensors
from megatron_sgt.export.shards import INDEX_FILE, write_weights


@pytest.mark.parametrize("max_bytes", [10, 10**6])
def test_tensors_by_name(tmp_path: Path, max_bytes: int) -> None:
    given = {"a.x": torch.ones(2, 3), "a.y": torch.zeros(4), "b": torch.full((2,), 2.0)}
    write_weights(
        tmp_path, {n: tuple(t.shape) for n, t in given.items()}, given.items(), torch.bfloat16, max_bytes
    )
    tensors = ExportedTensors(tmp_path)
    assert tensors.get("b").dtype == torch.float32
    assert {name: t.tolist() for name, t in tensors.below("a.").items()} == {
        "x": [[1.0] * 3] * 2,
        "y": [0.0] * 4,
    }
    with pytest.raises(CheckpointError, match="holds no c"):
        tensors.get("c")


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no readable weights"):
        ExportedTensors(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX_FILE).write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"holds no readable weights: .*two\.safetensors"):
        ExportedTensors(tmp_path)
