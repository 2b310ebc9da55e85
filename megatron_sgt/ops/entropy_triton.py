"""Entropy of the last attention row in Triton, all heads of a layer in two launches; definition in ``entropy.py``.

Keys are read once, in place and in their own type; the sums of each part of them (see ``loop_attention_triton``)
are merged in the second kernel, which also takes the mean over the batch. With documents each sequence has a row and
a first key of its own, and the second kernel adds up the sequences that count.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _row_and_start(starts_ptr, last_ptr, b, keys, queries, positions):
    """The last row of sequence b, -1 if it is not among the queries, and where its document begins."""
    row = tl.load(last_ptr + b)
    row = tl.where((row >= keys - queries) & (row < keys), row, -1)
    return row, tl.load(starts_ptr + b * positions + tl.maximum(row, 0))


@triton.jit
def part_kernel(
    q_ptr, k_ptr, starts_ptr, last_ptr, sums_ptr, q_stride_t, q_stride_b, q_stride_h, k_stride_t, k_stride_b,
    k_stride_h, keys, queries, positions, heads, repeat, scale, chunk,
    DOCUMENTS: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """(m, l, e) of one part of the keys (axis 1) for one head of one sequence (axis 0)."""
    pair, part = tl.program_id(0), tl.program_id(1)
    b, head = pair // heads, pair % heads
    across = tl.arange(0, BH)
    low, high = part * chunk, tl.minimum(keys, (part + 1) * chunk)
    if DOCUMENTS:
        row, start = _row_and_start(starts_ptr, last_ptr, b, keys, queries, positions)
        q_ptr += tl.maximum(row - (keys - queries), 0).to(tl.int64) * q_stride_t
        low, high = tl.maximum(low, start), tl.minimum(high, row + 1)
    q = tl.load(q_ptr + b * q_stride_b + head * q_stride_h + across, mask=across < H, other=0.0)
    q = q.to(tl.float32) * scale
    k_base = k_ptr + b.to(tl.int64) * k_stride_b + (head // repeat) * k_stride_h
    # Scalars of one row: a block of one keeps their type through the loop.
    m = tl.full([1], -1.0e30, tl.float32)
    l = tl.zeros([1], tl.float32)
    e = tl.zeros([1], tl.float32)
    for n in range(low, high, BN):
        column = n + tl.arange(0, BN)
        inside = column < high
        mask = inside[:, None] & (across < H)[None, :]
        place = column[:, None].to(tl.int64) * k_stride_t + across[None, :]
        k = tl.load(k_base + place, mask=mask, other=0.0).to(tl.float32)
        s = tl.where(inside, tl.sum(k * q[None, :], 1), -1.0e30)
        new = tl.maximum(m, tl.max(s, 0))
        t = s - new
        w = tl.where(inside, tl.exp2(t), 0.0)
        alpha = tl.exp2(m - new)
        e = alpha * (e + l * (m - new)) + tl.sum(tl.where(inside, w * t, 0.0), 0)
        l = alpha * l + tl.sum(w, 0)
        m = new
    place = sums_ptr + (pair * tl.num_programs(1) + part) * 3 + tl.arange(0, 1)
    tl.store(place, m)
    tl.store(place + 1, l)
    tl.store(place + 2, e)


@triton.jit
def merge_kernel(
    sums_ptr, starts_ptr, last_ptr, entropy_ptr, keys, queries, positions, batch, heads, parts, norm, minimum,
    DOCUMENTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Entropy of one head (axis 0): merged over the parts, averaged over the batch, times ``norm``.

    With documents the sum of the sequences' entropies, each over the logarithm of its tokens, and their number.
    """
    head = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    live = part < parts
    total, counted = 0.0, 0.0
    for b in range(batch):
        place = sums_ptr + ((b * heads + head) * parts + part) * 3
        m = tl.load(place, mask=live, other=-1.0e30)
        l = tl.load(place + 1, mask=live, other=0.0)
        e = tl.load(place + 2, mask=live, other=0.0)
        shift = m - tl.max(m, 0)
        w = tl.where(live, tl.exp2(shift), 0.0)
        all_l = tl.sum(w * l, 0)
        all_e = tl.sum(tl.where(live, w * (e + l * shift), 0.0), 0)
        if DOCUMENTS:
            row, start = _row_and_start(starts_ptr, last_ptr, b, keys, queries, positions)
            tokens = row + 1 - start
            if tokens >= minimum:
                total += (tl.log2(all_l) - all_e / all_l) / tl.log2(tokens.to(tl.float32))
                counted += 1.0
        else:
            total += tl.log2(all_l) - all_e / all_l
    if DOCUMENTS:
        tl.store(entropy_ptr + head, total)
        tl.store(entropy_ptr + heads + head, counted)
    else:
        tl.store(entropy_ptr + head, total * norm)


def last_row_entropy(query: Tensor, key: Tensor) -> Tensor:
    """As ``entropy.last_row_entropy``, for sequences of two tokens or more; the last stride of both is 1."""
    length, batch = key.shape[:2]
    entropy = torch.empty(query.shape[2], dtype=torch.float32, device=key.device)
    return _launch(query[-1:], key, entropy, math.log(2.0) / math.log(length) / batch)


def documents_entropy(query: Tensor, key: Tensor, starts: Tensor, last: Tensor, minimum: int) -> Tensor:
    """As ``entropy.documents_entropy``; the last stride of query and key is 1, starts and last are contiguous."""
    entropy = torch.empty(2, query.shape[2], dtype=torch.float32, device=key.device)
    return _launch(query, key, entropy, 1.0, starts, last, max(2, minimum))


def _launch(
    query: Tensor,
    key: Tensor,
    entropy: Tensor,
    norm: float,
    starts: Tensor | None = None,
    last: Tensor | None = None,
    minimum: int = 2,
) -> Tensor:
    length, batch, groups, size = key.shape
    heads = query.shape[2]
    chunk = max(128, triton.next_power_of_2(triton.cdiv(length, 64)))
    parts = triton.cdiv(length, chunk)
    sums = torch.empty(batch * heads, parts, 3, dtype=torch.float32, device=key.device)
    documented = starts is not None
    where, positions = ((sums, sums), length) if starts is None else ((starts, last), starts.shape[1])
    sizes = (length, len(query), positions)
    part_kernel[(batch * heads, parts)](
        query, key, *where, sums, *query.stride()[:3], *key.stride()[:3],
        *sizes, heads, heads // groups, math.log2(math.e) / math.sqrt(size), chunk,
        DOCUMENTS=documented, H=size, BH=triton.next_power_of_2(size), BN=64, num_warps=4
    )  # fmt: skip
    merge_kernel[(heads,)](
        sums, *where, entropy, *sizes, batch, heads, parts, norm, minimum,
        DOCUMENTS=documented, BLOCK=triton.next_power_of_2(parts), num_warps=1
    )  # fmt: skip
    return entropy
