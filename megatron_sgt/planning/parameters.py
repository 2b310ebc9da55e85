"""The weights of the model by part, and how many of them one tensor-parallel rank holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
Part = Literal["embedding", "attention", "mlp", "norms", "output"]


@dataclass(frozen=True)
class Weight:
    """``copies`` equal parameters of ``elements`` elements each; tensor-parallel ranks share the ``sharded`` ones."""

    name: str
    part: Part
    elements: int
    sharded: bool
    copies: int = 1

    def on_rank(self, tp_size: int) -> int:
        """Elements of one copy on one of ``tp_size`` ranks."""
        return self.elements // tp_size if self.sharded else self.elements


def weights(model: ModelConfig) -> Iterator[Weight]:
    """Every parameter of the model, padded vocabulary included; loops add none."""
    hidden, size, layers = model.hidden_size, model.kv_channels, model.num_layers
    heads, groups, ffn = model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size
    mlp_in = (2 if model.activation == "swiglu" else 1) * ffn
    qkv_rows = (heads + 2 * groups) * size
    norm_vectors = 2 if model.normalization == "LayerNorm" else 1
    vocabulary = model.padded_vocab_size() * hidden
    yield Weight("embedding", "embedding", vocabulary, True)
    yield Weight("qkv", "attention", qkv_rows * hidden, True, layers)
    yield Weight("proj", "attention", hidden * heads * size, True, layers)
    yield Weight("fc1", "mlp", mlp_in * hidden, True, layers)
    yield Weight("fc2", "mlp", hidden * ffn, True, layers)
    yield Weight("norm", "norms", hidden, False, 2 * norm_vectors * layers)
    if model.qk_layernorm:
        yield Weight("q/k norm", "norms", size, False, 2 * layers)
    if model.add_bias_linear or model.add_qkv_bias:
        yield Weight("qkv bias", "attention", qkv_rows, True, layers)
    if model.add_bias_linear:
        yield Weight("proj bias", "attention", hidden, False, layers)
        yield Weight("fc1 bias", "mlp", mlp_in, True, layers)
        yield Weight("fc2 bias", "mlp", hidden, False, layers)
    yield Weight("last norm", "norms", hidden, False, norm_vectors)
    if model.untie_embeddings_and_output_weights:
        yield Weight("output", "output", vocabulary, True)


def parameter_count(model: ModelConfig, tp_size: int = 1) -> int:
    """Number of weights on one of ``tp_size`` tensor-parallel ranks (default: of the whole model)."""
    return sum(w.copies * w.on_rank(tp_size) for w in weights(model))


def parameters_by_part(model: ModelConfig) -> dict[Part, int]:
    """Number of weights of the whole model by part; parts that the model has not are left out."""
    totals: dict[Part, int] = {}
    for weight in weights(model):
        totals[weight.part] = totals.get(weight.part, 0) + weight.copies * weight.elements
    return totals


def checkpoint_bytes(config: Config, precision: str) -> int:
    """Bytes of one checkpoint: weights, AdamW's moments, and the fp32 copy of the weights where there is one.

    (Counted under ZeRO in any case, though fp32 on one data-parallel rank goes without: ``Config.zero_stage_on``.)
    """
    copied = precision != "fp32" or config.parallel.zero_stage > 0
    per_parameter = ELEMENT_BYTES[precision] + (3 if copied else 2) * ELEMENT_BYTES["fp32"]
    return parameter_count(config.model) * per_parameter
