"""The shape of the decoder, under Megatron's names."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from megatron_sgt.config.base import Choice, Section, derived
from megatron_sgt.config.rotary import RotaryScaling
from megatron_sgt.errors import ConfigError

SWIGLU_MULTIPLE = 64
"""A derived SwiGLU width is rounded up to a multiple of this, so that tensor-parallel ranks can share it."""


class ModelConfig(Section):
    """A LLaMA-style decoder. What may be derived from other fields is, when the section is validated."""

    num_layers: int = Field(gt=0, le=10_000, description="Number of transformer layers.")
    hidden_size: int = Field(gt=0, le=2**20, description="Width of the residual stream.")
    num_attention_heads: int = Field(gt=0, le=2**16, description="Number of query heads per layer.")
    seq_length: int = Field(gt=1, le=2**26, description="Tokens per training sequence.")
    vocab_size: int | None = Field(
        default=None,
        gt=0,
        description="Entries of the vocabulary before padding; null: taken from the tokenizer.",
    )
    activation: Annotated[str, Choice("ffn", ("swiglu", "gelu"))] = Field(
        default="swiglu",
        description="Kind of the feed-forward layers: swiglu, gelu, or one that an installed package registers in the "
        "group megatron_sgt.ffn.",
    )
    ffn_hidden_size: int = derived(
        "Width inside the MLP; null: 8/3 of hidden_size rounded up to a multiple of 64 for swiglu, "
        "4 times hidden_size otherwise.",
        gt=0,
        le=2**24,
    )
    num_query_groups: int = derived(
        "Number of key/value heads, each shared by num_attention_heads / num_query_groups query heads; "
        "null: num_attention_heads (no sharing).",
        gt=0,
        le=2**16,
    )
    kv_channels: int = derived(
        "Size of one head; null: hidden_size / num_attention_heads, which must divide.", gt=0, le=2**16
    )
    make_vocab_size_divisible_by: int = Field(
        default=128,
        gt=0,
        le=2**20,
        description="The vocabulary is padded to a multiple of this; tensor_model_parallel_size divides it.",
    )
    normalization: Literal["RMSNorm", "LayerNorm"] = Field(
        default="RMSNorm", description="Kind of layer normalization."
    )
    layernorm_epsilon: float = Field(default=1e-6, gt=0, description="Epsilon inside every normalization.")
    rotary_base: float = Field(default=10000.0, gt=0, description="Theta of the rotary position embedding.")
    rotary_scaling: RotaryScaling | None = Field(
        default=None, description="How the rotary frequencies are scaled for longer contexts; null: not at all."
    )
    norm_position: Literal["input", "output"] = Field(
        default="input",
        description="What the norms of a layer normalize: input: what attention and MLP read, x + F(Norm(x)); output: "
        "what they add, x + Norm(F(x)), as OLMo-2 does.",
    )
    qk_layernorm: bool = Field(default=False, description="Normalize queries and keys before the rotation.")
    qk_layernorm_over: Literal["head", "all"] = Field(
        default="head",
        description="What qk_layernorm normalizes: head: each query and key head, with one weight for all of them; "
        "all: the queries of all heads together, and the keys, as OLMo-2 does.",
    )
    untie_embeddings_and_output_weights: bool = Field(
        default=True,
        description="Give the output projection its own weight; false: it shares the input embedding.",
    )
    add_bias_linear: bool = Field(default=False, description="Biases in the attention and MLP projections.")
    add_qkv_bias: bool = Field(default=False, description="A bias in the query/key/value projection alone.")
    init_method_std: float = Field(
        default=0.02,
        gt=0,
        description="Standard deviation of the initial weights; projections back into the residual stream "
        "divide it by sqrt(2 * num_layers).",
    )
    attention_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the attention weights.")
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on every residual branch.")
    use_cpu_initialization: bool | None = Field(
        default=None,
        description="Draw the initial weights on the CPU instead of the GPU: slower, and the same numbers on every "
        "kind of GPU. They are the same for every parallel layout either way. null: if the model trains on the CPU.",
    )

    # `info.data` holds only the earlier fields that were valid; where one is missing the section is refused
    # anyway, so any valid stand-in will do and adds no second message.
    @field_validator("ffn_hidden_size", mode="before")
    @classmethod
    def _derive_ffn(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            return value
        hidden = info.data.get("hidden_size", 1)
        if info.data.get("activation", "swiglu") != "swiglu":
            return 4 * hidden
        width = -(-8 * hidden // 3)
        return -(-width // SWIGLU_MULTIPLE) * SWIGLU_MULTIPLE

    @field_validator("num_query_groups", mode="before")
    @classmethod
    def _derive_groups(cls, value: Any, info: ValidationInfo) -> Any:
        return info.data.get("num_attention_heads", 1) if value is None else value

    @field_validator("kv_channels", mode="before")
    @classmethod
    def _derive_head_size(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            return value
        hidden, heads = info.data.get("hidden_size"), info.data.get("num_attention_heads")
        if hidden is None or heads is None:
            return 2
        if hidden % heads:
            raise ValueError(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; "
                "change one of them, or set kv_channels"
            )
        return hidden // heads

    @property
    def norms_all_heads(self) -> bool:
        """Whether queries and keys are normalised over all heads, so that a few heads need the projections of all."""
        return self.qk_layernorm and self.qk_layernorm_over == "all"

    def problems(self) -> Iterator[str]:
        if self.rotary_scaling is not None and self.rotary_scaling.type == "yarn" and self.rotary_base <= 1:
            yield f"rotary_base: rotary_scaling.type yarn needs one above 1, got {self.rotary_base:g}"
        if self.qk_layernorm_over == "all" and not self.qk_layernorm:
            yield "qk_layernorm_over: all has no effect with qk_layernorm false; set qk_layernorm: true"
        if self.num_attention_heads % self.num_query_groups:
            yield (
                f"num_query_groups: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.num_query_groups}"
            )
        if self.kv_channels % 2:
            yield f"kv_channels: must be even for the rotary embedding, got {self.kv_channels}"

    def padded_vocab_size(self, vocab_size: int | None = None) -> int:
        """Return the rows of the embedding: the vocabulary rounded up to make_vocab_size_divisible_by.

        Unlike Megatron's, the padding does not depend on the tensor-parallel size (which must divide
        make_vocab_size_divisible_by), so that a checkpoint has the same shape under every layout.
        ``vocab_size``: the tokenizer's, if not the model's own counts.

        Raises:
            ConfigError: both are null.
        """
        entries = self.vocab_size if vocab_size is None else vocab_size
        if entries is None:
            raise ConfigError("model.vocab_size: is null and no tokenizer gives it; set it, or set data.tokenizer")
        multiple = self.make_vocab_size_divisible_by
        return -(-entries // multiple) * multiple
