"""Shapes of the tiles that the Triton kernels work on, one table by (architecture, kernel, head size).

A table, not a tuner: the same machine always runs the same program. That each entry compiles without spilling
registers and fits the shared memory is tested ahead of time (``tests/ops/test_compile_ahead.py``); that it is the
fastest is for a measurement on a GPU to say.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows BM x columns BN (or the head size) per program, steps BK along the summed dimension, warps, pipeline stages.
_ENTRIES: dict[str, dict[tuple[int, int], tuple[int, int, int, int, int]]] = {
    # (compute capability at least, head size at least): the last entry that fits counts
    "project_in": {
        (80, 16): (128, 0, 64, 4, 3),
        (80, 128): (128, 0, 32, 8, 4),
        (90, 128): (128, 0, 64, 8, 3),
    },
    "project_out": {(80, 16): (128, 128, 64, 8, 3)},
    "output_gradient": {(80, 16): (128, 0, 64, 4, 3), (80, 128): (128, 0, 64, 8, 3)},
    "input_gradient": {(80, 16): (128, 128, 64, 8, 3)},
    "head_gradients": {(80, 16): (32, 0, 0, 4, 1)},
    "attend": {(80, 16): (64, 64, 0, 4, 3), (80, 128): (64, 64, 0, 4, 2), (90, 128): (64, 64, 0, 4, 3)},
    "attend_backward": {(80, 16): (64, 64, 0, 8, 2)},
}
SIZES = (16, 32, 64, 128)
"""Head sizes that the kernels are made for."""

INTERPRETED = 80
"""Architecture whose entries run where there is no GPU, in Triton's interpreter."""


def entry(kernel: str, arch: int, size: int, wide: bool = False) -> tuple[dict[str, int], dict[str, int]]:
    """Tile shape and launch options of ``kernel`` on compute capability ``arch`` (90: 9.0) at head size ``size``.

    ``wide``: fp32 operands. They take twice the shared memory and are multiplied without tensor cores, so they are
    worked on in half the steps and two stages.
    """
    fitting = [
        values
        for (least, width), values in sorted(_ENTRIES[kernel].items())
        if arch >= least and size >= width
    ]
    if not fitting:
        raise ValueError(f"no tile of {kernel} for compute capability {arch / 10} and head size {size}")
    rows, columns, step, warps, stages = fitting[-1]
    shape = {name: value for name, value in (("BM", rows), ("BN", columns), ("BK", min(step, size))) if value}
    if "BK" in shape and kernel in ("project_in", "output_gradient"):
        shape["BK"] = step  # these step along D, not along a head
    if wide:
        shape, stages = {name: max(16, value // 2) for name, value in shape.items()}, min(2, stages)
    return shape, {"num_warps": warps, "num_stages": stages}


def arch_of(x: Tensor) -> int:
    """Compute capability of the tensor's device, 90 for 9.0."""
    if x.device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def tile(kernel: str, x: Tensor, size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile shape and launch options of ``kernel`` for tensors like ``x``."""
    return entry(kernel, arch_of(x), size, x.dtype == torch.float32 and x.device.type == "cuda")


def split_keys(x: Tensor, keys: int, programs: int) -> int:
    """Keys that one program of the attention sums over: all, or a part where programs are few.

    A causal tile at the end of a sequence works alone long after the others are done; with fewer than two programs
    per multiprocessor its keys are shared out, 1024 at least to each program.
    """
    if x.device.type != "cuda":
        return 128 if keys > 128 else keys
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return 1024 if programs < 2 * processors and keys > 1024 else keys
