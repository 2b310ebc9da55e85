"""``causal_attention`` on this device, and each library kernel that it may choose, against scores in fp32."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.correctness import TOLERANCES, largest_error
from gpu_parts.machine import Machine, first_line
from megatron_sgt.ops.attention import causal_attention, causal_attention_reference, kernel_order, reads_documents
from megatron_sgt.ops.documents import Documents

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def check(machine: Machine, heads: str) -> Iterator[dict[str, Any]]:
    """Output and gradient of MHA or GQA on views into fused projections, as Megatron-Core hands them over."""
    fused, repeat, size = _inputs(machine, heads)
    wanted = _gradients(fused.float(), repeat, size, _only(SDPBackend.MATH))
    used = largest_error(_gradients(fused, repeat, size, causal_attention), wanted)
    detail = [f"as used {used:.1e}"]
    for kernel in _kernels(machine):
        name = kernel.name.removesuffix("_ATTENTION").lower()
        try:
            error = largest_error(_gradients(fused, repeat, size, _only(kernel)), wanted)
            detail.append(f"{name} {error:.1e}")
        except RuntimeError as reason:
            if "CUDA error" in str(reason):  # the process is lost, and what follows would be told of every kernel
                raise
            detail.append(f"{name} cannot ({first_line(reason)[:60]})")
    passed = used <= TOLERANCES[machine.dtype]
    yield {"check": f"causal_attention, {heads}", "passed": passed, "detail": "; ".join(detail)}


def documents(machine: Machine, heads: str) -> Iterator[dict[str, Any]]:
    """The same for attention that stays inside documents of uneven lengths, and whether it is one call."""
    fused, repeat, size = _inputs(machine, heads)
    length = len(fused)
    sequences = [_filled(parts, length) for parts in ((length // 3, 1, length // 2), (length - 7,))]
    begins = [torch.tensor([0, *itertools.accumulate(parts)][:-1]) for parts in sequences]
    rows = zip(begins, sequences, strict=True)
    starts = torch.stack([first.repeat_interleave(torch.tensor(parts)) for first, parts in rows]).int()
    made = Documents.of(starts, torch.tensor([length, length - 7]), machine.device)
    wanted = _gradients(fused.float(), repeat, size, partial(causal_attention_reference, documents=made))
    error = largest_error(_gradients(fused, repeat, size, partial(causal_attention, documents=made)), wanted)
    one = reads_documents(machine.device, machine.dtype, size)
    detail = f"{'one call of variable length' if one else 'a call per length'} {error:.1e}"
    yield {"check": f"documents, {heads}", "passed": error <= TOLERANCES[machine.dtype], "detail": detail}


def _filled(parts: tuple[int, ...], length: int) -> list[int]:
    return [*parts, length - sum(parts)]


def _inputs(machine: Machine, heads: str) -> tuple[Tensor, int, int]:
    """A fused projection [S, B, groups, (repeat + 2) · size] of MHA or GQA, repeat and size."""
    length, batch, size = (24, 2, 16) if machine.dry else (2048, 2, 128)
    groups, repeat = (2, 1) if heads == "MHA" else (2, 4)
    torch.manual_seed(0)
    shape = (length, batch, groups, (repeat + 2) * size)
    return torch.randn(shape, device=machine.device).to(machine.dtype), repeat, size


def _kernels(machine: Machine) -> list[SDPBackend]:
    if machine.device.type == "cuda":
        return kernel_order(machine.device)
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]


def _only(kernel: SDPBackend) -> Attention:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        with sdpa_kernel([kernel]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.permute(2, 0, 1, 3)

    return attend


def _gradients(fused: Tensor, repeat: int, size: int, attention: Attention) -> list[Tensor]:
    """[S, B, groups, (repeat + 2) · size] -> output, and the gradient of all of it."""
    fused = fused.detach().requires_grad_()
    query, key, value = fused.split([repeat * size, size, size], dim=-1)
    out = attention(query.reshape(*fused.shape[:2], -1, size), key, value)
    return [out.detach(), *torch.autograd.grad(out, [fused], torch.ones_like(out))]
