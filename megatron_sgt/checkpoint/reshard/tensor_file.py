"""Writes a safetensors file one tensor at a time.

The library's own writer wants all tensors in memory at once. Format: the header's length (8 bytes, little
endian), the header (JSON: type, shape and byte range of every tensor), the bytes of the tensors.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class TensorFileWriter:
    """Context manager: ``append`` every tensor in the order of ``shapes``.

    Args:
        shapes: of all tensors, by name, in the order in which they will come.
        dtype: of all tensors: fp32, bf16 or fp16.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32) -> None:
        self._path = path
        self._dtype = dtype
        self._waiting = [(name, tuple(shape)) for name, shape in shapes.items()]
        self._waiting.reverse()

    def __enter__(self) -> TensorFileWriter:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in reversed(self._waiting):
            end = offset + self._dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _NAMES[self._dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._stream = self._path.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)
        return self

    def append(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: it is not the one that comes next.
        """
        expected = self._waiting.pop() if self._waiting else None
        if (name, tuple(tensor.shape)) != expected or tensor.dtype != self._dtype:
            raise ValueError(f"expected {expected} as {self._dtype}, got {name} {tuple(tensor.shape)} {tensor.dtype}")
        self._stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stream:
            if kind is None:
                if self._waiting:
                    raise ValueError(f"{self._path.name} lacks {len(self._waiting)} tensors")
                self._stream.flush()
                os.fsync(self._stream.fileno())
