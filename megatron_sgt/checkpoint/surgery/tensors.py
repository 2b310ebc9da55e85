"""The maps applied: grown weights and moments, in the type of their sources."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_sgt.checkpoint.reshard.rank_state import MOMENTS
from megatron_sgt.stages.maps import AxisMap, TensorMap
from megatron_sgt.stages.optimizer import Carried


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
    if mapped.is_copy:
        return old
    reads = any(len(one.new) and not one.zero for _, one in _with_axes(mapped))
    new = _set_copies(mapped, initial().to(old) if reads else old.new_zeros(mapped.shape), old, "scale")
    for axis, one in _with_axes(mapped):
        if one.zero and reads:
            new.index_fill_(axis, torch.from_numpy(one.new), 0.0)
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
    seed = 0.0 if first or carried.moments != "seeded" else float(old.mean())
    new = old.new_full(mapped.shape, seed)
    if not mapped.zero:
        factors = None if carried.moments == "copy" else "gradient" if first else "gradient squared"
        _set_copies(mapped, new, old, factors)
    return new if factor == 1.0 else new.mul_(factor)


def _with_axes(mapped: TensorMap) -> list[tuple[int, AxisMap]]:
    return [(axis, one) for axis, one in enumerate(mapped.axes) if one is not None]


def _set_copies(mapped: TensorMap, new: Tensor, old: Tensor, factors: str | None) -> Tensor:
    """Give those entries of ``new`` that have a source the source's value, times the map's ``factors``."""
    places = [torch.arange(size) for size in mapped.shape]
    for axis, one in _with_axes(mapped):
        places[axis] = torch.from_numpy((one.index >= 0).nonzero()[0])
        old = old.index_select(axis, torch.from_numpy(one.index)[places[axis]])
        if factors is None:
            continue
        values = {"scale": one.scale, "gradient": one.gradient, "gradient squared": one.gradient**2}[factors]
        chosen = torch.as_tensor(values, dtype=old.dtype)[places[axis]]
        if bool((chosen != 1).any()):
            old.mul_(chosen.view(-1, *[1] * (old.dim() - axis - 1)))
    new[tuple(place.view(-1, *[1] * (new.dim() - axis - 1)) for axis, place in enumerate(places))] = old
    return new


def _zero_sum(noise: Tensor, axis: int, one: AxisMap, sources: int) -> Tensor:
    """``noise`` less its mean over the copies of each of ``sources`` old entries."""
    index = torch.from_numpy(one.index)
    shape = list(noise.shape)
    shape[axis] = sources
    mean = noise.new_zeros(shape).index_add_(axis, index, noise)
    counts = torch.bincount(index, minlength=sources).to(noise)
    mean /= counts.view(-1, *[1] * (noise.dim() - axis - 1))
    return noise.sub_(mean.index_select(axis, index))
