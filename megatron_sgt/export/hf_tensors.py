"""The weights of a Hugging Face folder, read one tensor at a time; damage is found before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sgt.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What safetensors calls the types that weights may have."""


class HFTensors:
    """Names, shapes and types of all tensors of ``folder``; ``read`` gives one of them.

    Raises:
        CheckpointError: no safetensors, a shard that is missing or cut off, a tensor that is not where the index
            says, a type that is neither fp32 nor bf16 nor fp16.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        wanted = _index(folder)
        read = set(wanted.values()) or {SINGLE_FILE}
        self.left_out = tuple(sorted(path.name for path in folder.glob("*.safetensors") if path.name not in read))
        """Files of weights that are no part of the model: adapters, or another copy of it."""
        for name in sorted(read):
            self._open(folder / name)
        if absent := sorted(set(wanted) - set(self._file_of)):
            raise CheckpointError(
                f"{folder}: {len(absent)} tensors of {INDEX_FILE} are in none of its shards: {', '.join(absent[:4])}"
            )

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, "pt")
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing; copy the whole folder again") from error
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; it may have been cut off, copy it again") from error
        for name in file.keys():  # noqa: SIM118 (the file is no dictionary)
            found = file.get_slice(name)
            dtype = found.get_dtype()
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{path}: {name} is stored as {dtype}; only fp32, bf16 and fp16 weights can be read"
                )
            if name in self._file_of:
                raise CheckpointError(f"{self._folder}: {name} is in two of its shards")
            self._file_of[name] = file
            self.shapes[name], self.dtypes[name] = tuple(found.get_shape()), DTYPES[dtype]

    def read(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def forget(self, name: str) -> None:
        """Leave out a redundant tensor."""
        del self._file_of[name], self.shapes[name], self.dtypes[name]


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file, as the index says; empty for a folder with one file and no index."""
    path = folder / INDEX_FILE
    if not path.is_file():
        if (folder / SINGLE_FILE).is_file():
            return {}
        older = sorted(file.name for file in folder.glob("pytorch_model*"))
        raise CheckpointError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}"
            + (f"; {older[0]} is of an older format: load it with transformers and save_pretrained it" if older else "")
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        wanted = {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error
    if elsewhere := [file for file in wanted.values() if Path(file).name != file or not file.isprintable()]:
        raise CheckpointError(f"{path} names {ascii(elsewhere[0])[:80]}, which is no file of its folder")
    return wanted
