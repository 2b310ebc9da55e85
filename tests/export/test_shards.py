"""Weight files: how tensors are divided over them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.hf_tensors import INDEX_FILE
from megatron_sgt.export.shards import divide, write_weights

SHAPES = {"a": (4, 8), "b": (8,), "c": (16, 8), "d": (8,)}


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def test_divide_fills_files_in_order() -> None:
    files = divide(SHAPES, torch.bfloat16, max_bytes=90)
    assert [list(part) for part in files.values()] == [["a", "b"], ["c"], ["d"]]
    assert next(iter(files)) == "model-00001-of-00003.safetensors"
    assert list(divide(SHAPES, torch.bfloat16, max_bytes=10**9)) == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_bytes", [100, 10**9])
def test_files_hold_the_tensors(tmp_path: Path, dtype: torch.dtype, max_bytes: int) -> None:
    given = tensors()
    size = write_weights(tmp_path, SHAPES, given.items(), dtype, max_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {name: t for file in files for name, t in load_file(file).items()}
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name].to(dtype)) for name in given)
    assert size == 176 * dtype.itemsize
    if len(files) > 1:
        index = json.loads((tmp_path / INDEX_FILE).read_text())
        assert index["metadata"]["total_size"] == size and index["weight_map"].keys() == given.keys()
        assert {tmp_path / name for name in index["weight_map"].values()} == set(files)
    else:
        assert not (tmp_path / INDEX_FILE).exists()


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "c is not finite"), (1e6, "float16 cannot hold")])
def test_refuses_weights_that_are_no_numbers(tmp_path: Path, value: float, words: str) -> None:
    given = tensors()
    given["c"][3, 3] = value
    with pytest.raises(CheckpointError, match=words):
        write_weights(tmp_path, SHAPES, given.items(), torch.float16, 10**9)
