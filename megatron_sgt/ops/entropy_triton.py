"""Entropy of the last attention row in Triton, all heads of a layer in two launches; definition in ``entropy.py``.

Keys are read once, in place and in their own type; the sums of each part of them (see ``loop_attention_triton``)
are merged in the second kernel, which also takes the mean over the batch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def part_kernel(
    q_ptr, k_ptr, sums_ptr, q_stride_b, q_stride_h, k_stride_t, k_stride_b, k_stride_h,
    keys, heads, repeat, scale, chunk,
    H: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """(m, l, e) of one part of the keys (axis 1) for one head of one sequence (axis 0)."""
    pair, part = tl.program_id(0), tl.program_id(1)
    b, head = pair // heads, pair % heads
    across = tl.arange(0, BH)
    q = tl.load(q_ptr + b * q_stride_b + head * q_stride_h + across, mask=across < H, other=0.0)
    q = q.to(tl.float32) * scale
    k_base = k_ptr + b.to(tl.int64) * k_stride_b + (head // repeat) * k_stride_h
    # Scalars of one row: a block of one keeps their type through the loop.
    m = tl.full([1], -1.0e30, tl.float32)
    l = tl.zeros([1], tl.float32)
    e = tl.zeros([1], tl.float32)
    for n in range(part * chunk, tl.minimum(keys, (part + 1) * chunk), BN):
        column = n + tl.arange(0, BN)
        inside = column < keys
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
    sums_ptr, entropy_ptr, batch, heads, parts, norm, BLOCK: tl.constexpr
):  # fmt: skip
    """Entropy of one head (axis 0): merged over the parts, averaged over the batch, times ``norm``."""
    head = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    live = part < parts
    total = 0.0
    for b in range(batch):
        place = sums_ptr + ((b * heads + head) * parts + part) * 3
        m = tl.load(place, mask=live, other=-1.0e30)
        l = tl.load(place + 1, mask=live, other=0.0)
        e = tl.load(place + 2, mask=live, other=0.0)
        shift = m - tl.max(m, 0)
        w = tl.where(live, tl.exp2(shift), 0.0)
        all_l = tl.sum(w * l, 0)
        all_e = tl.sum(tl.where(live, w * (e + l * shift), 0.0), 0)
        total += tl.log2(all_l) - all_e / all_l
    tl.store(entropy_ptr + head, total * norm)


def last_row_entropy(query: Tensor, key: Tensor) -> Tensor:
    """As ``entropy.last_row_entropy``, for sequences of two tokens or more; the last stride of both is 1."""
    length, batch, groups, size = key.shape
    heads = query.shape[2]
    chunk = max(128, triton.next_power_of_2(triton.cdiv(length, 64)))
    parts = triton.cdiv(length, chunk)
    sums = torch.empty(batch * heads, parts, 3, dtype=torch.float32, device=key.device)
    entropy = torch.empty(heads, dtype=torch.float32, device=key.device)
    last = query[-1]
    part_kernel[(batch * heads, parts)](
        last, key, sums, *last.stride()[:2], *key.stride()[:3],
        length, heads, heads // groups, math.log2(math.e) / math.sqrt(size), chunk,
        H=size, BH=triton.next_power_of_2(size), BN=64, num_warps=4
    )  # fmt: skip
    norm = math.log(2.0) / math.log(length) / batch
    merge_kernel[(heads,)](sums, entropy, batch, heads, parts, norm, BLOCK=triton.next_power_of_2(parts), num_warps=1)
    return entropy
