"""One parameter under both of its names, with its shape and how tensor-parallel ranks share it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Shape = tuple[int, ...]
Split = Literal["replicated", "rows", "columns", "qkv", "vocab"]
"""How tensor-parallel ranks share a parameter.

* ``replicated``: the same on every rank;
* ``rows``: each of its tensors is split along dimension 0; a rank holds its pieces one below the other;
* ``columns``: split along dimension 1;
* ``qkv``: [q; k; v] interleaved by query group, then split along dimension 0 (see ``HeadLayout``);
* ``vocab``: split along dimension 0, after padding with rows of zeros.
"""
Kind = Literal["matrix", "residual", "norm", "bias"]
"""What a parameter is: ``residual`` is a matrix that writes into the residual stream."""
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a number by precision."""
Part = Literal["embedding", "attention", "mlp", "norms", "output"]


@dataclass(frozen=True)
class Weight:
    """One parameter of Megatron-Core's model.

    ``megatron``: its name below ``gpt.``; ``hf``: the Hugging Face tensors that it is made of; ``shapes``: theirs,
    whole, the vocabulary with its padding; ``part``: where a plan counts it.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    split: Split
    kind: Kind
    part: Part

    @property
    def whole(self) -> dict[str, Shape]:
        """Its Hugging Face tensors and their shapes."""
        return dict(zip(self.hf, self.shapes, strict=True))

    @property
    def layer(self) -> int | None:
        """The decoder layer that it belongs to; None outside of the layers."""
        names = self.megatron.split(".")
        return int(names[2]) if names[:2] == ["decoder", "layers"] else None

    @property
    def decays(self) -> bool:
        """Whether weight decay on matrices reaches it."""
        return self.kind in ("matrix", "residual")

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def on_rank(self, tp_size: int) -> int:
        return math.prod(self.shard_shape(tp_size))

    def shard_shape(self, tp_size: int) -> Shape:
        first, *rest = self.shapes[0]
        if self.split == "replicated":
            return self.shapes[0]
        if self.split == "columns":
            return (first, rest[0] // tp_size)
        return (sum(shape[0] for shape in self.shapes) // tp_size, *rest)


def linear(megatron: str, hf: Mapping[str, Shape], split: Split, part: Part, bias: bool = False) -> Iterator[Weight]:
    """The matrix of a linear layer, and its bias. ``hf``: Hugging Face modules and the shapes of their matrices.

    A matrix that is split by columns writes into the residual stream; its bias is added after the sum over ranks.
    """
    back = split == "columns"
    names, shapes = tuple(hf), tuple(hf.values())
    yield Weight(
        f"{megatron}.weight",
        tuple(f"{name}.weight" for name in names),
        shapes,
        split,
        "residual" if back else "matrix",
        part,
    )
    if bias:
        yield Weight(
            f"{megatron}.bias",
            tuple(f"{name}.bias" for name in names),
            tuple(shape[:1] for shape in shapes),
            "replicated" if back else split,
            "bias",
            part,
        )


def norm(megatron: str, hf: str, size: int, bias: bool = False, split: Split = "replicated") -> Iterator[Weight]:
    """The weight of a norm over ``size`` elements, and its bias."""
    yield Weight(f"{megatron}.weight", (f"{hf}.weight",), ((size,),), split, "norm", "norms")
    if bias:
        yield Weight(f"{megatron}.bias", (f"{hf}.bias",), ((size,),), split, "bias", "norms")
