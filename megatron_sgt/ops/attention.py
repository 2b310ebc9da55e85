"""Causal attention of any set of heads.

    out[i, b, n] = Σ_{j<=i} softmax_j( q[i, b, n] · k[j, b, n // R] / sqrt(H) ) v[j, b, n // R]

``causal_attention_reference`` is the definition, with a materialised score matrix; ``causal_attention`` is
the same through ``torch.nn.functional.scaled_dot_product_attention``, which never materialises it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def fastest_kernel(device: torch.device) -> Iterator[None]:
    """Order torch's attention kernels by speed on ``device``: on GPUs from Hopper on cuDNN's before FlashAttention-2.

    Left alone torch prefers FlashAttention-2, which public tables put well behind (docs/kernels.md). A kernel that
    cannot take the inputs is passed over. On a CPU nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if torch.cuda.get_device_capability(device) >= (9, 0):
        order.insert(0, SDPBackend.CUDNN_ATTENTION)
    with sdpa_kernel(order, set_priority=True):
        yield


def causal_attention(query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Causal attention through the fastest library kernel that torch finds.

    Args:
        query: [S, B, N, H].
        key, value: [S, B, G, H] with N divisible by G (head n reads group n // (N // G)).
        dropout_p: dropout of the attention weights. Above 0 the CPU has only a kernel that materialises them.

    Returns:
        [S, B, N, H].
    """
    heads, groups = query.shape[2], key.shape[2]
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    grouped = heads != groups
    if grouped and query.device.type == "cpu":
        # Repeating is a copy of k and v, never of scores: the CPU kernel has no grouped form, and torch
        # falls back to materialised scores when asked for one.
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        grouped = False
    with fastest_kernel(query.device):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3)


def causal_attention_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition of ``causal_attention`` (dropout 0): same shapes, materialised scores."""
    repeat = query.shape[2] // key.shape[2]
    k, v = (t.repeat_interleave(repeat, dim=2) for t in (key, value))
    scores = torch.einsum("ibnh,jbnh->bnij", query, k) / math.sqrt(query.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return torch.einsum("bnij,jbnh->ibnh", scores.masked_fill(future, float("-inf")).softmax(-1), v)
