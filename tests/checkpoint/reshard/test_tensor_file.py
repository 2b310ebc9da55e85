from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_sgt.checkpoint.reshard.tensor_file import TensorFileWriter

TENSORS = {"a": torch.randn(3, 5), "b.c": torch.randn(7), "d": torch.randn(2, 3).t()}
SHAPES = {name: tensor.shape for name, tensor in TENSORS.items()}


def test_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with TensorFileWriter(path, SHAPES) as writer:
        for name, tensor in TENSORS.items():
            writer.append(name, tensor)
    read = load_file(path)
    assert list(read) == list(TENSORS)
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    for name, tensor in (("b.c", TENSORS["b.c"]), ("a", torch.randn(5, 3)), ("a", TENSORS["a"].double())):
        with (
            pytest.raises(ValueError, match=r"expected \('a', \(3, 5\)\)"),
            TensorFileWriter(tmp_path / "file.safetensors", SHAPES) as writer,
        ):
            writer.append(name, tensor)


def test_a_file_that_lacks_tensors_is_no_success(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="lacks 2 tensors"),
        TensorFileWriter(tmp_path / "file.safetensors", SHAPES) as writer,
    ):
        writer.append("a", TENSORS["a"])


def test_an_error_on_the_way_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(KeyError), TensorFileWriter(tmp_path / "file.safetensors", SHAPES):
        raise KeyError
