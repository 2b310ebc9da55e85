"""The table of all weights of a model. Names, shapes, shards, counts and initial values are derived from it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from megatron_sgt.arch.attention import CAUSAL
from megatron_sgt.arch.ffn import ffn_kind
from megatron_sgt.arch.weight import Weight, linear, norm
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.config.pipeline import PipelineLayout

NORMS = {
    "input": (("input_layernorm", "input_layernorm"), ("pre_mlp_layernorm", "post_attention_layernorm")),
    "output": (
        ("post_attention_layernorm", "post_attention_layernorm"),
        ("post_mlp_layernorm", "post_feedforward_layernorm"),
    ),
}
"""By ``model.norm_position``: the norm of attention and that of the MLP, under Megatron's and Hugging Face's names."""


@lru_cache(maxsize=16)
def weights(model: ModelConfig) -> tuple[Weight, ...]:
    """Every parameter of ``model``, embedding first; loops add none.

    Raises:
        ConfigError: ``model.vocab_size`` is null.
    """
    return tuple(_weights(model))


def _weights(model: ModelConfig) -> Iterator[Weight]:
    vocabulary = (model.padded_vocab_size(), model.hidden_size)
    yield from linear("embedding.word_embeddings", {"model.embed_tokens": vocabulary}, "vocab", "embedding")
    for layer in range(model.num_layers):
        yield from layer_weights(model, layer)
    yield from _norm(model, "decoder.final_layernorm", "model.norm")
    if model.untie_embeddings_and_output_weights:
        yield from linear("output_layer", {"lm_head": vocabulary}, "vocab", "output")


def stage_weights(model: ModelConfig, layout: PipelineLayout, stage: int) -> tuple[Weight, ...]:
    """The parameters that ``stage`` of a pipeline holds, in the order of the table.

    A weight that embedding and output layer share is the first stage's; the last one borrows it.
    """
    return tuple(weight for weight in weights(model) if stage_of(weight, layout) == stage)


def stage_of(weight: Weight, layout: PipelineLayout) -> int:
    """The stage of a pipeline that holds ``weight``."""
    if weight.layer is not None:
        return layout.stage_of(weight.layer)
    return 0 if weight.part == "embedding" else layout.size - 1


def layer_weights(model: ModelConfig, layer: int) -> list[Weight]:
    """The parameters of one decoder layer, in the order in which files hold them."""
    megatron, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
    first, second = (
        list(_norm(model, f"{megatron}.{ours}", f"{hf}.{theirs}")) for ours, theirs in NORMS[model.norm_position]
    )
    attention, ffn = list(CAUSAL.weights(model, layer)), list(ffn_kind(model.activation).weights(model, layer))
    if model.norm_position == "output":
        found = [*attention, *first, *ffn, *second]
    else:
        found = [*first, *attention, *second, *ffn]
    return sorted(found, key=_comes_last)


def ends_branch(weight: Weight, model: ModelConfig) -> bool:
    """Whether a layer of ``model`` adds to its input what this parameter makes: nothing, where these are all zero."""
    if model.norm_position == "output":
        return weight.layer is not None and weight.megatron.split(".")[3] in dict(NORMS["output"])
    back = weight.kind == "bias" and weight.split == "replicated" and weight.part != "norms"
    return weight.layer is not None and (weight.kind == "residual" or back)


def _comes_last(weight: Weight) -> bool:
    return weight.kind == "bias" and weight.part != "norms" and weight.split != "qkv"


def _norm(model: ModelConfig, megatron: str, hf: str) -> Iterator[Weight]:
    return norm(megatron, hf, model.hidden_size, bias=model.normalization == "LayerNorm")
