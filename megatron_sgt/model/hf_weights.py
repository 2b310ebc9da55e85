"""Cuts whole Hugging Face tensors into Megatron-Core's shards and joins them again, by the table of ``arch.weights``.

Pure functions on tensors: no process group, any tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.arch.weight import Shape, Weight
from megatron_sgt.arch.weights import weights
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import CheckpointError


def megatron_shard(
    tensors: Mapping[str, Tensor],
    model: ModelConfig,
    tp_size: int = 1,
    tp_rank: int = 0,
    held: Sequence[Weight] | None = None,
) -> dict[str, Tensor]:
    """The parameters of one tensor-parallel rank, by Megatron name, from whole Hugging Face tensors.

    Args:
        held: those of the model that the rank's pipeline stage holds; None: all.

    Raises:
        CheckpointError: a tensor is missing or left over, or has the wrong shape.
    """
    check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, model)
    return {
        weight.megatron: shard(weight, [tensors[n] for n in weight.hf], model, tp_size, tp_rank)
        for weight in (weights(model) if held is None else held)
    }


def check_tensors(shapes: Mapping[str, Shape], model: ModelConfig) -> None:
    """Check that whole Hugging Face tensors of these ``shapes`` are those of ``model``, no more and no less.

    The vocabulary may have its padding or not.

    Raises:
        CheckpointError: a tensor is missing or left over, or has the wrong shape.
    """
    table = weights(model)
    wanted = {name for weight in table for name in weight.hf}
    if missing := sorted(wanted - set(shapes)):
        raise CheckpointError(f"weights lack {len(missing)} tensors of this model: {', '.join(missing[:4])}")
    if extra := sorted(set(shapes) - wanted):
        raise CheckpointError(f"weights hold {len(extra)} tensors unknown to this model: {', '.join(extra[:4])}")
    for weight in table:
        for name, shape in weight.whole.items():
            check_shape(name, shapes[name], shape, model.vocab_size if weight.split == "vocab" else None)


def check_shape(name: str, found: Shape, shape: Shape, fewest_rows: int | None = None) -> None:
    """Compare a weight's shape; ``fewest_rows``: of a vocabulary without its padding, None: exactly ``shape``.

    Raises:
        CheckpointError: it does not fit.
    """
    if fewest_rows is None:
        fits, wanted = found == shape, str(list(shape))
    else:
        fits = len(found) == 2 and fewest_rows <= found[0] <= shape[0] and found[1] == shape[1]
        wanted = f"[{fewest_rows} to {shape[0]}, {shape[1]}]"
    if not fits:
        raise CheckpointError(f"{name} has the shape {list(found)}, this model's has {wanted}")


def shard(weight: Weight, parts: Sequence[Tensor], model: ModelConfig, tp_size: int = 1, tp_rank: int = 0) -> Tensor:
    """One rank's share of a weight, from its whole Hugging Face tensors in the order of ``weight.hf``."""
    if weight.split == "replicated":
        return parts[0].clone()
    if weight.split == "columns":
        return parts[0].chunk(tp_size, dim=1)[tp_rank].clone()
    if weight.split == "rows":
        return torch.cat([part.chunk(tp_size)[tp_rank] for part in parts])
    if weight.split == "qkv":
        whole = torch.cat(list(parts))[torch.tensor(HeadLayout.of(model).fused_qkv_order())]
    else:
        rows, width = weight.shapes[0]
        whole = torch.cat([parts[0], parts[0].new_zeros(rows - len(parts[0]), width)])
    return whole.chunk(tp_size)[tp_rank].clone()


def hf_weights(shards: Sequence[Mapping[str, Tensor]], model: ModelConfig) -> dict[str, Tensor]:
    """Whole Hugging Face tensors from the parameters of all tensor-parallel ranks, rank 0 first.

    The vocabulary is trimmed to ``model.vocab_size``. Inverse of ``megatron_shard``.
    """
    whole: dict[str, Tensor] = {}
    for weight in weights(model):
        whole |= join(weight, [rank[weight.megatron] for rank in shards], model)
    return whole


def join(weight: Weight, shards: Sequence[Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The whole Hugging Face tensors of a weight, from all tensor-parallel ranks' shares of it."""
    return dict(zip(weight.hf, _join(weight, shards, model), strict=True))


def _join(weight: Weight, shards: Sequence[Tensor], model: ModelConfig) -> Sequence[Tensor]:
    if weight.split == "replicated":
        return [shards[0].clone()]
    if weight.split == "columns":
        return [torch.cat(list(shards), dim=1)]
    if weight.split == "rows":
        pieces = [shape[0] // len(shards) for shape in weight.shapes]
        return [torch.cat(part) for part in zip(*(s.split(pieces) for s in shards), strict=True)]
    whole = torch.cat(list(shards))
    if weight.split == "vocab":
        return [whole[: model.vocab_size].clone()]
    stacked = torch.empty_like(whole)
    stacked[torch.tensor(HeadLayout.of(model).fused_qkv_order())] = whole
    return [part.clone() for part in stacked.split([shape[0] for shape in weight.shapes])]
