"""The weights of a Hugging Face folder: read exactly, and damage found before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.hf_tensors import INDEX_FILE, SINGLE_FILE, HFTensors

A, B = torch.arange(6.0).view(2, 3), torch.arange(4).bfloat16()
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tensors in two shards with an index."""
    save_file({"a": A}, tmp_path / SHARDS[0])
    save_file({"b": B}, tmp_path / SHARDS[1])
    index = {"metadata": {}, "weight_map": dict(zip("ab", SHARDS, strict=True))}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    return tmp_path


def test_reads_shards_and_single_files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = HFTensors(folder)
    assert found.shapes == {"a": (2, 3), "b": (4,)}
    assert found.dtypes == {"a": torch.float32, "b": torch.bfloat16}
    assert torch.equal(found.read("a"), A) and torch.equal(found.read("b"), B)
    found.forget("b")
    assert set(found.shapes) == {"a"}
    single = tmp_path_factory.mktemp("single")
    save_file({"a": A}, single / SINGLE_FILE)
    assert torch.equal(HFTensors(single).read("a"), A)


def test_other_weights_are_left_out_by_name(folder: Path) -> None:
    assert HFTensors(folder).left_out == ()
    save_file({"w": torch.zeros(1)}, folder / "adapter_model.safetensors")
    assert HFTensors(folder).left_out == ("adapter_model.safetensors",)


def cut(folder: Path) -> None:
    file = folder / SHARDS[1]
    file.write_bytes(file.read_bytes()[:-2])


def double(folder: Path) -> None:
    save_file({"a": A, "b": B}, folder / SHARDS[1])


def move(folder: Path) -> None:
    save_file({"c": B}, folder / SHARDS[1])


def quantise(folder: Path) -> None:
    save_file({"b": B.to(torch.int8)}, folder / SHARDS[1])


def spoil_index(folder: Path) -> None:
    (folder / INDEX_FILE).write_text("{}")


def leave_older_format(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / SHARDS[1]).unlink(), f"{SHARDS[1]} is missing"),
        (cut, "cut off"),
        (double, "a is in two of its shards"),
        (move, "1 tensors of model.safetensors.index.json are in none of its shards: b"),
        (quantise, "b is stored as I8; only fp32, bf16 and fp16"),
        (spoil_index, "weight_map"),
        (lambda folder: (folder / INDEX_FILE).unlink(), "has neither model.safetensors nor"),
        (leave_older_format, "pytorch_model.bin is of an older format"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError) as found:
        HFTensors(folder)
    assert says in str(found.value)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "a\x00b"])
def test_an_index_names_only_files_of_its_folder(name: str, folder: Path) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="which is no file of its folder"):
        HFTensors(folder)
