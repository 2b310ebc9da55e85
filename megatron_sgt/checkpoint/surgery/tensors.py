"""The maps applied: grown weights and moments, in the type of their sources."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_sgt.checkpoint.reshard.rank_state import MOMENTS
from megatron_sgt.checkpoint.surgery.maps import AxisMap, TensorMap
from megatron_sgt.checkpoint.surgery.optimizer import Carried


def grown_weight(
    mapped: TensorMap, old: Tensor, initial: Callable[[], Tensor], noise: Callable[[], Tensor | None]
) -> Tensor:
    """The new tensor that ``mapped`` describes; ``old`` itself where it is a copy.

    Args:
        initial: draws the whole initial tensor, if some of it is needed.
        noise: draws standard normal noise of the new shape; None: there is none.
    """
    if mapped.zero:
        return old.new_zeros(mapped.shape)
    new = _gathered(mapped, old)
    for axis, one in _with_axes(mapped):
        _multiply(new, axis, one.scale)
    readers = [(axis, one) for axis, one in _with_axes(mapped) if len(one.new) and not one.zero]
    if readers:
        value = initial().to(new)
        for axis, one in readers:
            _fill(new, axis, one, value)
    for axis, one in _with_axes(mapped):
        if one.zero:
            _fill(new, axis, one, 0.0)
    if mapped.noisy is not None and (drawn := noise()) is not None:
        copies = dict(_with_axes(mapped))[mapped.noisy]
        new += _zero_sum(drawn.to(new), mapped.noisy, copies, old.shape[mapped.noisy]) * new.square().mean().sqrt()
    return new


def grown_moment(mapped: TensorMap, old: Tensor, quantity: str, carried: Carried) -> Tensor:
    """The new tensor's moment ``quantity`` from that of its source, see ``optimizer.py``."""
    first = quantity == MOMENTS[0]
    factor = carried.exp_avg if first else carried.exp_avg_sq
    if mapped.is_copy:
        return old if factor == 1.0 else old * factor
    new = old.new_zeros(mapped.shape) if mapped.zero else _gathered(mapped, old)
    for axis, one in _with_axes(mapped):
        if carried.moments != "copy":
            _multiply(new, axis, one.gradient if first else one.gradient**2)
    seed = 0.0 if first or carried.moments != "seeded" else float(old.mean())
    if mapped.zero:
        return new.fill_(seed * factor)
    for axis, one in _with_axes(mapped):
        _fill(new, axis, one, seed)
    return new if factor == 1.0 else new.mul_(factor)


def _with_axes(mapped: TensorMap) -> list[tuple[int, AxisMap]]:
    return [(axis, one) for axis, one in enumerate(mapped.axes) if one is not None]


def _gathered(mapped: TensorMap, old: Tensor) -> Tensor:
    """Copies of the entries of ``old``; where an entry has no source, anything."""
    new = old
    for axis, one in _with_axes(mapped):
        new = new.index_select(axis, torch.from_numpy(one.index).clamp(min=0))
    return new


def _multiply(new: Tensor, axis: int, factors: object) -> None:
    values = torch.as_tensor(factors, dtype=new.dtype)
    if bool((values != 1).any()):
        new.mul_(values.view(-1, *[1] * (new.dim() - axis - 1)))


def _fill(new: Tensor, axis: int, one: AxisMap, value: Tensor | float) -> None:
    """Give the new entries of an axis those of ``value``, a tensor of the new shape or a number."""
    where = torch.from_numpy(one.new)
    if not len(where):
        return
    if isinstance(value, Tensor):
        new.index_copy_(axis, where, value.index_select(axis, where))
    else:
        new.index_fill_(axis, where, value)


def _zero_sum(noise: Tensor, axis: int, one: AxisMap, sources: int) -> Tensor:
    """``noise`` less its mean over the copies of each of ``sources`` old entries."""
    index = torch.from_numpy(one.index)
    shape = list(noise.shape)
    shape[axis] = sources
    mean = noise.new_zeros(shape).index_add_(axis, index, noise)
    counts = torch.bincount(index, minlength=sources).to(noise)
    mean /= counts.view(-1, *[1] * (noise.dim() - axis - 1))
    return noise.sub_(mean.index_select(axis, index))
