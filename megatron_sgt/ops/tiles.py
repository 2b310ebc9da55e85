"""Shapes of the tiles that the Triton kernels work on, one table by (architecture, kernel, head size).

A table, not a tuner: the same machine always runs the same program. That each entry compiles without spilling
registers and fits the shared memory is tested ahead of time (``tests/ops/test_compile_ahead.py``); whether it is
the fastest has to be measured on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

AMD = 0
"""Stands for the compute capability of AMD's GPUs (CDNA: 64 KiB of shared memory, waves of 64 threads)."""

# Rows BM x columns BN (or the head size) per program, steps BK along the summed dimension, warps, pipeline stages.
_ENTRIES: dict[str, dict[tuple[int, int], tuple[int, int, int, int, int]]] = {
    # (compute capability at least, head size at least): the last entry that fits counts
    "project_in": {
        (AMD, 16): (128, 0, 64, 8, 2),
        (80, 16): (128, 0, 64, 4, 3),
        (80, 128): (128, 0, 32, 8, 4),
        (90, 128): (128, 0, 64, 8, 3),
        (120, 128): (128, 0, 32, 8, 4),
    },
    "project_out": {(AMD, 16): (128, 128, 64, 8, 2), (80, 16): (128, 128, 64, 8, 3)},
    "output_gradient": {
        (AMD, 16): (128, 0, 64, 8, 2),
        (80, 16): (128, 0, 64, 8, 3),
    },
    "input_gradient": {(AMD, 16): (128, 128, 64, 8, 2), (80, 16): (128, 128, 64, 8, 3)},
    "head_gradients": {(AMD, 16): (32, 0, 0, 4, 1), (80, 16): (32, 0, 0, 4, 1)},
    "attend": {
        (AMD, 16): (64, 64, 0, 4, 2),
        (80, 16): (64, 64, 0, 4, 3),
        (80, 128): (64, 64, 0, 4, 2),
        (90, 128): (64, 64, 0, 4, 3),
        (120, 128): (64, 64, 0, 4, 2),
    },
    "attend_backward": {
        (AMD, 16): (64, 64, 0, 8, 1),
        (AMD, 128): (64, 64, 0, 4, 1),
        (80, 16): (64, 32, 0, 8, 2),
        (80, 128): (64, 64, 0, 8, 2),
        (90, 16): (64, 64, 0, 8, 2),
        (100, 128): (64, 64, 0, 8, 1),
        (120, 16): (64, 32, 0, 8, 2),
        (120, 128): (64, 64, 0, 8, 2),
    },
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
        if (arch >= least > AMD or arch == least) and size >= width
    ]
    if not fitting:
        raise ValueError(f"no tile of {kernel} for compute capability {arch / 10} and head size {size}")
    rows, columns, step, warps, stages = fitting[-1]
    shape = {name: value for name, value in (("BM", rows), ("BN", columns), ("BK", min(step, size))) if value}
    if "BK" in shape and kernel in ("project_in", "output_gradient"):
        shape["BK"] = step  # these step along D, not along a head
    if wide:
        shape, stages = {name: max(16, value // 2) for name, value in shape.items()}, min(2, stages)
        if kernel == "attend" and size >= 128:
            shape["BN"] = 16  # 32 spilled hundreds of bytes on sm_90
    return shape, {"num_warps": warps, "num_stages": stages}


def arch_of(x: Tensor) -> int:
    """Compute capability of the tensor's device, 90 for 9.0; ``AMD`` on AMD's, whose numbers mean something else."""
    if x.device.type != "cuda":
        return INTERPRETED
    if torch.version.hip is not None:
        return AMD
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def tile(kernel: str, x: Tensor, size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile shape and launch options of ``kernel`` for tensors like ``x``."""
    return entry(kernel, arch_of(x), size, x.dtype == torch.float32 and x.device.type == "cuda")


FORWARD_PART, BACKWARD_PART = 1024, 2048
"""Positions that one program of the attention sums over where its work is split. Partial gradients are three fp32
tensors, which have to be written and read again: fewer and longer parts than in the forward pass."""


def split_keys(x: Tensor, keys: int, programs: int, part: int = FORWARD_PART) -> int:
    """Keys that one program of the attention sums over: all, or a part where programs are few.

    A causal tile at the end of a sequence works alone long after the others are done; with fewer than two programs
    per multiprocessor its keys are split, ``part`` of them for each program.
    """
    if x.device.type != "cuda":
        return 128 if keys > 128 else keys
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return part if programs < 2 * processors and keys > part else keys
