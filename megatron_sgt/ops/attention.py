"""Causal attention of any set of heads, from the last Q of K positions. This is its only definition.

    out[i, b, n] = Σ_{j <= K − Q + i} softmax_j( q[i, b, n] · k[j, b, n // R] / sqrt(H) ) v[j, b, n // R],   i < Q

Where a sequence has documents (``documents.py``), j begins at the start of that of position K − Q + i.

``causal_attention_reference`` is the definition, with the materialised scores of ``causal_scores``. Each fast version
is held against it: ``causal_attention`` is the same for Q = K through torch's ``scaled_dot_product_attention``, which
never materialises scores; ``shard_attention`` for Q < K; ``loop_attention`` with gates and entropies.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from functools import cache, partial

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_sgt.ops.document_attention import by_document, variable_length, variable_length_kernel
from megatron_sgt.ops.documents import Documents

# GPU generation -> name in torch's registry of FlashAttention implementations, and the module that it imports.
_NEWER = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute.interface")}


@cache
def newer_flash_attention(device: torch.device) -> tuple[str | None, str]:
    """Put FlashAttention-3 (Hopper) or -4 (Blackwell) in the place of torch's FlashAttention-2, where installed.

    Called when a model is built: looking for packages in the middle of a graph would break torch.compile.

    Returns:
        Its name in torch's registry (``torch.nn.attention.activate_flash_attention_impl``, torch 2.11), or None (no
        such GPU, no such package, or one that cannot be used); and in the last case the reason.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return None, ""
    name, module = _NEWER.get(torch.cuda.get_device_capability(device)[0], ("", ""))
    if not name or importlib.util.find_spec(module.partition(".")[0]) is None:
        return None, ""
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        return None, f"{name} is not used: torch {torch.__version__} has no registry for it"
    try:
        activate(name)
    except (ImportError, RuntimeError, ValueError, AttributeError) as error:
        return None, f"{name} is not used: {error}"
    return name, ""


def describe_attention(device: torch.device) -> str:
    """One line for the log: the library kernels of attention, fastest first, and what is installed but not used."""
    if device.type != "cuda":
        return f"attention: torch's kernel for {device.type}"
    newer, unused = newer_flash_attention(device)
    names = [kernel.name.removesuffix("_ATTENTION").lower() for kernel in kernel_order(device)]
    note = f"flash is {newer}" if newer else unused
    return f"attention: {', '.join(names)}" + (f" ({note})" if note else "")


def kernel_order(device: torch.device, dropout_p: float = 0.0) -> list[SDPBackend]:
    """torch's attention kernels by speed on a GPU, fastest first; torch skips those that cannot take the inputs.

    By default torch prefers FlashAttention-2. Public tables rank it well behind cuDNN on Hopper and later, and
    FlashAttention-3 ahead of cuDNN (docs/kernels.md). FlashAttention-3 and -4 have no dropout and raise when asked.
    """
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    newer = current() if current else None  # as set by newer_flash_attention; no package is searched here
    flash = [] if newer and dropout_p else [SDPBackend.FLASH_ATTENTION]
    # AMD's capability numbers mean something else (gfx942 says 9.4), and cuDNN is Nvidia's.
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    cudnn = [SDPBackend.CUDNN_ATTENTION] if hopper else []
    first = flash + cudnn if newer else cudnn + flash
    return [*first, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def reads_groups(device: torch.device, dtype: torch.dtype, head_size: int, dropout_p: float = 0.0) -> bool:
    """Whether a kernel that keeps no scores reads grouped keys and values as they are.

    FlashAttention does: 16-bit numbers, heads of at most 256, from compute capability 8.0 on. cuDNN does where
    FlashAttention does, but not with every dropout. The memory-efficient kernel, the only one for fp32, wants as many
    keys as queries (``can_use_mem_efficient_attention`` in torch's sdp_utils.cpp, up to 2.13 at least): asked for
    groups, torch passes over it to the kernel that materialises the scores.

    The CPU's kernel reads groups too (torch 2.13), in 0.83 to 1.01 of the time of repeated keys, with the same outputs
    and gradients of queries. It sums those of keys and values in another order, 1e-6 away; runs keep their bits.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_size > 256:
        return False
    if SDPBackend.FLASH_ATTENTION not in kernel_order(device, dropout_p):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def reads_documents(device: torch.device, dtype: torch.dtype, head_size: int, dropout_p: float = 0.0) -> bool:
    """Whether torch's variable-length attention runs: FlashAttention on Nvidia's GPUs, without dropout.

    Elsewhere documents are attended length by length. Unlike ``scaled_dot_product_attention`` it fills up no heads,
    whose size must be a multiple of 8. torch does not say that AMD's kernels have it.
    """
    if dropout_p or head_size % 8 or torch.version.hip is not None or variable_length_kernel() is None:
        return False
    return reads_groups(device, dtype, head_size)


@contextlib.contextmanager
def fastest_kernel(device: torch.device, dropout_p: float = 0.0) -> Iterator[None]:
    """Let attention on a GPU try the kernels of ``kernel_order``. On a CPU nothing changes."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(kernel_order(device, dropout_p), set_priority=True):
        yield


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, documents: Documents | None = None
) -> Tensor:
    """Causal attention through the fastest library kernel that torch finds.

    Args:
        query: [S, B, N, H].
        key, value: [S, B, G, H] with N divisible by G (head n reads group n // (N // G)).
        dropout_p: dropout of the attention weights. Above 0 the CPU has only a kernel that materialises them.
        documents: those of the S positions, which attention then never leaves.

    Returns:
        [S, B, N, H].
    """
    if documents is not None:
        kernel = variable_length_kernel()
        if kernel and reads_documents(query.device, query.dtype, query.shape[3], dropout_p):
            return variable_length(kernel, query, key, value, documents)
        return by_document(partial(causal_attention, dropout_p=dropout_p), query, key, value, documents)
    heads, groups = query.shape[2], key.shape[2]
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    grouped = heads != groups
    if grouped and not reads_groups(query.device, query.dtype, query.shape[3], dropout_p):
        # A copy of k and v, never of scores, which torch materialises when no other kernel has a grouped form.
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        grouped = False
    with fastest_kernel(query.device, dropout_p):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3)


def causal_scores(query: Tensor, key: Tensor, documents: Documents | None = None) -> Tensor:
    """Scores [B, N, Q, K] in nats, -inf where a query must not look; query [Q, B, N, H], key [K, B, N, H], Q <= K."""
    return scores_within(query, key, None if documents is None else documents.starts)


def scores_within(query: Tensor, key: Tensor, starts: Tensor | None) -> Tensor:
    """``causal_scores``; ``starts`` [B, K at least]: as of ``Documents``."""
    queries, keys = len(query), len(key)
    scores = torch.einsum("ibnh,jbnh->bnij", query, key) / math.sqrt(query.shape[-1])
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
    if starts is not None:
        first = starts[:, keys - queries : keys, None]
        hidden = (hidden | (torch.arange(keys, device=scores.device) < first)).unsqueeze(1)
    return scores.masked_fill(hidden, float("-inf"))


def causal_attention_reference(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None = None) -> Tensor:
    """The definition: query [Q, B, N, H], key and value [K, B, G, H] -> [Q, B, N, H]; materialised scores.

    ``documents``: of K positions at least.
    """
    repeat = query.shape[2] // key.shape[2]
    k, v = (t.repeat_interleave(repeat, dim=2) for t in (key, value))
    return torch.einsum("bnij,jbnh->ibnh", causal_scores(query, k, documents).softmax(-1), v)
