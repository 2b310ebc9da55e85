"""What a growth means for every tensor, from the table of weights alone: a new kind of layer needs no line here.

Which size an axis counts is found by asking the table for a model in which that size is larger by one. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_sgt.arch.weight import Shape, Weight
from megatron_sgt.arch.weights import ends_branch, layer_weights, weights
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.growth import Growth

HIDDEN = "hidden_size"


@dataclass(frozen=True)
class AxisMap:
    """Entry i of a new axis is ``scale[i]`` times entry ``index[i]`` of the old one.

    Where ``index[i]`` is -1 it is an initial value, or zero if ``zero``. ``gradient[i]``: of a copied entry, over the
    gradient of its source, where the growth preserves the function.
    """

    index: NDArray[np.int64]
    scale: NDArray[np.float64]
    gradient: NDArray[np.float64]
    zero: bool

    @property
    def new(self) -> NDArray[np.int64]:
        """The entries that are copies of none."""
        return np.flatnonzero(self.index < 0)


@dataclass(frozen=True)
class TensorMap:
    """One new tensor, under its Hugging Face name, and the old one that it is made of.

    ``axes``: None for an axis that stays. ``zero``: all of it is zero. ``noisy``: the axis whose copies get noise.
    """

    name: str
    source: str
    shape: Shape
    axes: tuple[AxisMap | None, ...]
    zero: bool = False
    noisy: int | None = None

    @property
    def is_copy(self) -> bool:
        return not self.zero and all(axis is None for axis in self.axes)

    @property
    def has_new_entries(self) -> bool:
        """Whether some entries have no source, so that they have no moments either."""
        return self.zero or any(axis is not None and len(axis.new) for axis in self.axes)


@dataclass(frozen=True)
class WeightMap:
    """A parameter of the new model, the old one that it is made of, and its tensors."""

    new: Weight
    old: Weight
    tensors: tuple[TensorMap, ...]


def maps_of(growth: Growth) -> dict[str, WeightMap]:
    """How each parameter of the new model is made, by its Megatron name, in the order of the table.

    Raises:
        ConfigError: the table does not say how an axis of this model is divided into units.
    """
    maker = _Maker(growth)
    return {new.megatron: maker.weight(new, old, layer) for new, old, layer in _pairs(growth)}


def has_new_entries(maps: dict[str, WeightMap]) -> bool:
    """Whether any entry of the new model has no source."""
    return any(tensor.has_new_entries for one in maps.values() for tensor in one.tensors)


def _pairs(growth: Growth) -> Iterator[tuple[Weight, Weight, int | None]]:
    """(new parameter, old one, new layer or None outside of all layers)."""
    source: dict[str, tuple[Weight, int | None]] = {old.megatron: (old, None) for old in weights(growth.old)}
    for layer, before in enumerate(growth.layers):
        pairs = zip(layer_weights(growth.new, layer), layer_weights(growth.old, before), strict=True)
        source |= {new.megatron: (old, layer) for new, old in pairs}
    for new in weights(growth.new):
        yield new, *source[new.megatron]


class _Maker:
    """Makes the maps of one growth; tensors of the same kind share those of their axes."""

    def __init__(self, growth: Growth) -> None:
        self.growth = growth
        self.root = math.sqrt(growth.old.hidden_size / growth.new.hidden_size)
        self._made: dict[tuple[object, ...], AxisMap] = {}

    def weight(self, new: Weight, old: Weight, layer: int | None) -> WeightMap:
        growth, tensors = self.growth, []
        silent = layer in growth.silent and ends_branch(new, growth.new)
        for place, (name, shape) in enumerate(new.whole.items()):
            # Norms of queries and keys share epsilon, which shrinks: what they normalise shrinks with it.
            shrinks = growth.new.qk_layernorm and new.split == "qkv" and place < 2 and HIDDEN in growth.widths
            axes = [self._axis(new, old.hf[place], axis) for axis in range(len(shape))]
            _check_lengths(growth.old, old, place, axes, shape)
            if shrinks:
                axes[0] = self._times_root(axes[0], shape[0])
            repeated = (n for n, axis in enumerate(axes) if axis is not None and (axis.scale != 1).any())
            noisy = next(repeated, None) if growth.noise and new.kind == "residual" else None
            tensors.append(TensorMap(name, old.hf[place], shape, tuple(axes), silent, noisy))
        return WeightMap(new, old, tuple(tensors))

    def _axis(self, weight: Weight, source: str, axis: int) -> AxisMap | None:
        for size in self.growth.widths:
            entries = _entries_per_unit(self.growth.old, size).get((source, axis))
            if entries is None:
                continue
            if weight.part == "norms" and size != HIDDEN:
                raise ConfigError(f"{source} normalises over {size}, which cannot grow then; grow other sizes")
            key = (size, entries, writes(weight, size), weight.kind == "norm")
            if key not in self._made:
                self._made[key] = self._made_of_units(*key)
            return self._made[key]
        return None

    def _made_of_units(self, size: str, entries: int, writes: bool, norm: bool) -> AxisMap:
        masked = self.growth.ramp is not None  # new units change nothing, whatever they write
        unit = np.array(self.growth.widths[size], dtype=np.int64)
        index = np.where(unit[:, None] < 0, -1, unit[:, None] * entries + np.arange(entries)).ravel()
        same = np.ones(len(index))
        if norm:
            return AxisMap(index, same * self.root, same / self.root, zero=False)
        copies = np.where(unit < 0, 1, np.bincount(unit[unit >= 0])[unit])
        share = np.repeat(1.0 / copies, entries)
        return AxisMap(index, share if writes else same, same if writes else share, zero=writes and not masked)

    def _times_root(self, axis: AxisMap | None, length: int) -> AxisMap:
        key = ("root", length, axis is None)
        if key not in self._made:
            if axis is None:
                axis = AxisMap(np.arange(length), np.ones(length), np.ones(length), zero=False)
            self._made[key] = AxisMap(axis.index, axis.scale * self.root, axis.gradient / self.root, axis.zero)
        return self._made[key]


def writes(weight: Weight, size: str) -> bool:
    """Whether the parameter writes the units that ``size`` counts, or passes on what they hold: then new ones are zero.

    All others read them, or make what they hold.
    """
    if size == HIDDEN:
        back = weight.kind == "bias" and weight.split == "replicated" and weight.part != "norms"
        return weight.kind == "residual" or weight.part == "embedding" or back
    return weight.kind == "residual"


def _check_lengths(model: ModelConfig, old: Weight, place: int, axes: Sequence[AxisMap | None], shape: Shape) -> None:
    """Check that the maps lead from a tensor of the old shape to one of the new ``shape``."""
    for axis, before, now in zip(axes, old.shapes[place], shape, strict=True):
        if now != (before if axis is None else len(axis.index)):
            raise _unclear(model, old.hf[place], before)


def _unclear(model: ModelConfig, name: str, length: int) -> ConfigError:
    return ConfigError(
        f"{name}: it is not clear which of its {length} entries belong to which unit of {model.activation}, so that it "
        "cannot become wider"
    )


@lru_cache(maxsize=16)
def _entries_per_unit(model: ModelConfig, size: str) -> dict[tuple[str, int], int]:
    """(tensor, axis) of every axis that ``size`` determines -> entries of the axis for each of its units."""
    units = getattr(model, size)
    longer = _shapes(model.model_copy(update={size: units + 1}))
    found: dict[tuple[str, int], int] = {}
    for name, shape in _shapes(model).items():
        for axis, (length, more) in enumerate(zip(shape, longer[name], strict=True)):
            if more == length:
                continue
            if (more - length) * units != length:
                raise _unclear(model, name, length)
            found[name, axis] = more - length
    return found


def _shapes(model: ModelConfig) -> dict[str, Shape]:
    return {name: shape for weight in weights(model) for name, shape in weight.whole.items()}
