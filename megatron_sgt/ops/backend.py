"""Which implementation of the fused loop runs where: availability of Triton, and the table for the attention.

``auto`` never fails: it takes what the device can run and logs it. A backend that is requested by name and cannot
run raises ``BackendError`` with the reason.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from megatron_sgt.ops.tiles import SIZES

Backend = Literal["torch", "triton"]
AttentionKind = Literal["custom", "library"]


class BackendError(RuntimeError):
    """The requested backend cannot run here; the message says why."""


@dataclass(frozen=True)
class LoopShape:
    """What the choice depends on: the model's norms, head size and dropouts, and the device and type of its tensors."""

    device: torch.device
    dtype: torch.dtype
    head_size: int
    norm: str = "RMSNorm"
    norm_position: str = "input"
    norms_all_heads: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for the GPU (TRITON_INTERPRET=1 before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1" and triton_installed()


@cache
def triton_installed() -> bool:
    """Whether Triton is installed; it is not imported to find out."""
    return importlib.util.find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels can be launched on ``device``."""
    return triton_installed() and (device.type == "cuda" or interpreted())


def obstacle(shape: LoopShape) -> str | None:
    """Why the fused loop cannot run for ``shape``; None if it can."""
    if not triton_installed():
        return "Triton is not installed (pip install megatron-sgt[gpu])"
    if not runs_triton(shape.device):
        return f"the device is {shape.device.type}, not a GPU"
    if shape.device.type == "cuda" and torch.cuda.get_device_capability(shape.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if shape.norm != "RMSNorm":
        return f"the norm is {shape.norm}; only RMSNorm folds into the projection"
    if shape.norm_position != "input":
        return f"model.norm_position is {shape.norm_position}; only norms of inputs fold into the projection"
    if shape.norms_all_heads:
        return "model.qk_layernorm_over is all, for which kept heads need the projections of all heads"
    if shape.head_size not in SIZES:
        return f"the head size is {shape.head_size}; kernels exist for {', '.join(map(str, SIZES))}"
    if shape.attention_dropout or shape.hidden_dropout:
        return "the model has dropout"
    if shape.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the type is {shape.dtype}"
    if interpreted() and shape.dtype == torch.bfloat16 and shape.device.type == "cpu":
        return "Triton's interpreter has no bf16"
    return None


def choose_backend(wanted: Literal["auto", "torch", "triton"], shape: LoopShape) -> tuple[Backend, str]:
    """The backend of the sparse loop, and one line for the log.

    Raises:
        BackendError: ``wanted`` is "triton", which cannot run for ``shape``.
    """
    if wanted == "torch":
        return "torch", "loop kernels: torch (train.loop_backend)"
    reason = obstacle(shape)
    if wanted == "triton":
        if reason:
            raise BackendError(f"train.loop_backend is triton, but {reason}; use auto or torch")
        return "triton", "loop kernels: triton (train.loop_backend)"
    if shape.device.type == "cpu":  # the interpreter is for tests: it is used only on request
        return "torch", "loop kernels: torch, the device is cpu"
    return ("torch", f"loop kernels: torch, {reason}") if reason else ("triton", "loop kernels: triton")


# (compute capability at least, head size) -> most sequences x kept heads that the custom attention is used for, at
# sequences of at most so many tokens. From a model of occupancy (docs/kernels.md), not from a measurement: the
# custom kernel splits keys and starts long tiles first, which helps while tiles are few; library kernels are
# faster per tile.
_CUSTOM_UP_TO: dict[tuple[int, int], tuple[int, int]] = {
    (80, 64): (4, 16384),
    (80, 128): (4, 16384),
    (90, 64): (4, 16384),
    (90, 128): (4, 16384),
}


def choose_attention(
    pairs: int, tokens: int, head_size: int, arch: int, wanted: Literal["auto", "custom", "library"] = "auto"
) -> AttentionKind:
    """Custom or library attention for a loop pass.

    The documents of a micro-batch do not count: the choice is one for the run, whose programs are compiled before it.

    Args:
        pairs: sequences x kept heads. tokens: keys. arch: as of ``tiles.arch_of``.
        wanted: ``train.loop_attention``; other than "auto" it overrides the table.
    """
    if wanted != "auto":
        return wanted
    known = [a for a, size in _CUSTOM_UP_TO if a <= arch and size == head_size]
    if not known:
        return "library"
    most_pairs, most_tokens = _CUSTOM_UP_TO[max(known), head_size]
    return "custom" if pairs <= most_pairs and tokens <= most_tokens else "library"
