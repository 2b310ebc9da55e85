"""One table between Hugging Face Llama weight names and Megatron-Core's, read in both directions.

Pure functions on dictionaries of tensors: no process group, any tensor-parallel size. Kinds of entries:

* ``replicated``: the same on every tensor-parallel rank;
* ``rows``/``columns``: split along dimension 0/1;
* ``qkv``: [q; k; v] interleaved by query group, then split along dimension 0 (see ``HeadLayout``);
* ``glu``: [gate; up], each split along dimension 0, a rank holding its [gate part; up part];
* ``vocab``: split along dimension 0 after padding with zero rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import CheckpointError

Kind = Literal["replicated", "rows", "columns", "qkv", "glu", "vocab"]


@dataclass(frozen=True)
class Entry:
    """One Megatron-Core parameter (name below ``gpt.``) and the Hugging Face tensors that it is made of."""

    megatron: str
    hf: tuple[str, ...]
    kind: Kind


def name_map(model: ModelConfig) -> Iterator[Entry]:
    """Every parameter of ``model``, embedding first."""
    yield Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab")
    for layer in range(model.num_layers):
        yield from _layer_map(model, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    yield from _norm_map(model, "decoder.final_layernorm", "model.norm")
    if model.untie_embeddings_and_output_weights:
        yield Entry("output_layer.weight", ("lm_head.weight",), "vocab")


def _layer_map(model: ModelConfig, mcore: str, hf: str) -> Iterator[Entry]:
    attention, qkv = f"{mcore}self_attention.", tuple(f"{hf}self_attn.{x}_proj." for x in "qkv")
    mlp = tuple(f"{hf}mlp.{x}_proj." for x in (("gate", "up") if model.activation == "swiglu" else ("up",)))
    fc1: Kind = "glu" if model.activation == "swiglu" else "rows"
    yield from _norm_map(model, f"{mcore}input_layernorm", f"{hf}input_layernorm")
    yield Entry(f"{attention}linear_qkv.weight", tuple(f"{x}weight" for x in qkv), "qkv")
    if model.add_bias_linear or model.add_qkv_bias:
        yield Entry(f"{attention}linear_qkv.bias", tuple(f"{x}bias" for x in qkv), "qkv")
    if model.qk_layernorm:
        for x in "qk":
            yield Entry(f"{attention}{x}_layernorm.weight", (f"{hf}self_attn.{x}_norm.weight",), "replicated")
    yield Entry(f"{attention}linear_proj.weight", (f"{hf}self_attn.o_proj.weight",), "columns")
    yield from _norm_map(model, f"{mcore}pre_mlp_layernorm", f"{hf}post_attention_layernorm")
    yield Entry(f"{mcore}mlp.linear_fc1.weight", tuple(f"{x}weight" for x in mlp), fc1)
    yield Entry(f"{mcore}mlp.linear_fc2.weight", (f"{hf}mlp.down_proj.weight",), "columns")
    if model.add_bias_linear:
        yield Entry(f"{attention}linear_proj.bias", (f"{hf}self_attn.o_proj.bias",), "replicated")
        yield Entry(f"{mcore}mlp.linear_fc1.bias", tuple(f"{x}bias" for x in mlp), fc1)
        yield Entry(f"{mcore}mlp.linear_fc2.bias", (f"{hf}mlp.down_proj.bias",), "replicated")


def _norm_map(model: ModelConfig, mcore: str, hf: str) -> Iterator[Entry]:
    yield Entry(f"{mcore}.weight", (f"{hf}.weight",), "replicated")
    if model.normalization == "LayerNorm":
        yield Entry(f"{mcore}.bias", (f"{hf}.bias",), "replicated")


def megatron_shard(
    weights: Mapping[str, Tensor], model: ModelConfig, tp_size: int = 1, tp_rank: int = 0
) -> dict[str, Tensor]:
    """The parameters of one tensor-parallel rank, by Megatron name, from whole Hugging Face tensors.

    Raises:
        CheckpointError: a tensor is missing or left over, or has the wrong shape.
    """
    check_tensors({name: tuple(tensor.shape) for name, tensor in weights.items()}, model)
    layout, vocab_rows = _layout(model), model.padded_vocab_size()
    return {
        e.megatron: _shard(e, [weights[n] for n in e.hf], layout, vocab_rows, tp_size, tp_rank)
        for e in name_map(model)
    }


def check_tensors(shapes: Mapping[str, tuple[int, ...]], model: ModelConfig) -> None:
    """Check that whole Hugging Face tensors of these ``shapes`` are those of ``model``, no more and no less.

    Raises:
        CheckpointError: a tensor is missing or left over, or has the wrong shape.
    """
    wanted = [name for entry in name_map(model) for name in entry.hf]
    if missing := sorted(set(wanted) - set(shapes)):
        raise CheckpointError(f"weights lack {len(missing)} tensors of this model: {', '.join(missing[:4])}")
    if extra := sorted(set(shapes) - set(wanted)):
        raise CheckpointError(
            f"weights hold {len(extra)} tensors unknown to this model: {', '.join(extra[:4])}"
        )
    for name in wanted:
        _check_shape(name, shapes[name], model, model.padded_vocab_size())


def _check_shape(name: str, found: tuple[int, ...], model: ModelConfig, vocab_rows: int) -> None:
    """Raises CheckpointError. The vocabulary may be padded already, up to ``vocab_rows``."""
    shape = hf_shape(name, model)
    if _is_vocabulary(name):
        least = model.vocab_size or 1
        fits = len(found) == 2 and least <= found[0] <= vocab_rows and found[1] == shape[1]
        wanted = f"[{least} to {vocab_rows}, {shape[1]}]"
    else:
        fits, wanted = found == shape, str(list(shape))
    if not fits:
        raise CheckpointError(f"{name} has the shape {list(found)}, this model's has {wanted}")


def hf_shape(name: str, model: ModelConfig) -> tuple[int, ...]:
    """Shape of a whole Hugging Face tensor of ``model``, the vocabulary with its padding."""
    hidden, ffn, size = model.hidden_size, model.ffn_hidden_size, model.kv_channels
    queries, keys = model.num_attention_heads * size, model.num_query_groups * size
    module, kind = name.split(".")[-2:]
    if _is_vocabulary(name):
        return (model.padded_vocab_size(), hidden)
    matrices = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }
    shape = matrices.get(module, (size,) if module in ("q_norm", "k_norm") else (hidden,))
    return shape[:1] if kind == "bias" else shape


def _is_vocabulary(name: str) -> bool:
    return name.split(".")[-2] in ("embed_tokens", "lm_head")


def shard_entry(
    entry: Entry, parts: Sequence[Tensor], model: ModelConfig, tp_size: int = 1, tp_rank: int = 0
) -> Tensor:
    """One entry of ``megatron_shard``: from its whole Hugging Face tensors, in the order of ``entry.hf``.

    Raises:
        CheckpointError: more rows than the padded vocabulary.
    """
    return _shard(entry, parts, _layout(model), model.padded_vocab_size(), tp_size, tp_rank)


def _shard(
    entry: Entry, parts: Sequence[Tensor], layout: HeadLayout, vocab_rows: int, tp_size: int, tp_rank: int
) -> Tensor:
    if entry.kind == "replicated":
        return parts[0].clone()
    if entry.kind == "columns":
        return parts[0].chunk(tp_size, dim=1)[tp_rank].clone()
    if entry.kind == "glu":
        return torch.cat([part.chunk(tp_size)[tp_rank] for part in parts])
    if entry.kind == "qkv":
        whole = torch.cat(list(parts))[torch.tensor(layout.fused_qkv_order())]
    elif entry.kind == "vocab":
        whole = torch.cat([parts[0], parts[0].new_zeros(vocab_rows - len(parts[0]), parts[0].shape[1])])
    else:
        whole = parts[0]
    return whole.chunk(tp_size)[tp_rank].clone()


def hf_weights(shards: Sequence[Mapping[str, Tensor]], model: ModelConfig) -> dict[str, Tensor]:
    """Whole Hugging Face tensors from the parameters of all tensor-parallel ranks, rank 0 first.

    The vocabulary is trimmed to ``model.vocab_size`` when that is set. Inverse of ``megatron_shard``.
    """
    layout = _layout(model)
    whole: dict[str, Tensor] = {}
    for entry in name_map(model):
        whole |= zip(
            entry.hf, _join(entry, [shard[entry.megatron] for shard in shards], model, layout), strict=True
        )
    return whole


def join_entry(entry: Entry, parts: Sequence[Tensor], model: ModelConfig) -> list[Tensor]:
    """One entry of ``hf_weights``: its whole tensors in the order of ``entry.hf``, from all ranks' shards."""
    return _join(entry, parts, model, _layout(model))


def _join(entry: Entry, parts: Sequence[Tensor], model: ModelConfig, layout: HeadLayout) -> list[Tensor]:
    if entry.kind == "replicated":
        return [parts[0].clone()]
    if entry.kind == "columns":
        return [torch.cat(list(parts), dim=1)]
    if entry.kind == "glu":
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return [torch.cat(gates), torch.cat(ups)]
    whole = torch.cat(list(parts))
    if entry.kind == "qkv":
        stacked = torch.empty_like(whole)
        stacked[torch.tensor(layout.fused_qkv_order())] = whole
        kv_rows = layout.num_groups * layout.head_dim
        return [
            part.clone() for part in stacked.split([layout.num_heads * layout.head_dim, kv_rows, kv_rows])
        ]
    return [whole[: model.vocab_size].clone() if entry.kind == "vocab" else whole]


def _layout(model: ModelConfig) -> HeadLayout:
    return HeadLayout(model.num_attention_heads, model.num_query_groups, model.kv_channels)
