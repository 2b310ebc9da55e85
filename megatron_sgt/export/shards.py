"""Writes weights as Hugging Face's sharded safetensors, one parameter in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_sgt.checkpoint.reshard.tensor_file import TensorFileWriter
from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.hf_tensors import INDEX_FILE, SINGLE_FILE
from megatron_sgt.files import write_json

Shapes = Mapping[str, tuple[int, ...]]


def divide(shapes: Shapes, dtype: torch.dtype, max_bytes: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> the tensors in it, in their order; a tensor above ``max_bytes`` gets a file of its own."""
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if parts[-1] and filled + size > max_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = shape
        filled += size
    if len(parts) == 1:
        return {SINGLE_FILE: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, start=1)}


def write_weights(
    folder: Path, shapes: Shapes, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, max_bytes: int
) -> int:
    """Write ``tensors``, in the order of ``shapes``, as ``dtype``, indexed if in several files; returns their bytes.

    Raises:
        CheckpointError: a weight is not finite, or not in ``dtype``.
    """
    files = divide(shapes, dtype, max_bytes)
    stream = iter(tensors)
    for file, wanted in files.items():
        with TensorFileWriter(folder / file, wanted, dtype) as writer:
            for _ in wanted:
                writer.append(*_cast(*next(stream), dtype))
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    if len(files) > 1:
        where = {name: file for file, wanted in files.items() for name in wanted}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(folder / INDEX_FILE, index)
    return total


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> tuple[str, Tensor]:
    cast = tensor.to(dtype)
    if not bool(cast.isfinite().all()):
        what = "is not finite" if not bool(tensor.isfinite().all()) else f"has values that {dtype} cannot hold"
        raise CheckpointError(f"{name} {what}; export an earlier step, or with --dtype fp32 or bf16")
    return name, cast
