"""From the project's model to a Hugging Face ``config.json``: which architecture, under which names.

A model in which no layer loops is a plain Llama, Qwen2, Qwen3 or OLMo-2 where one of them is exactly the same function;
every other one is of a form of ``sgt``, whose code travels with the folder (``export/forms.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_sgt.arch.attention import CAUSAL
from megatron_sgt.arch.ffn import ffn_kind
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.forms import STANDARD, Form
from megatron_sgt.growth import LayerPlan, LoopPlan

TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class TokenIds:
    """Ids that generation needs; None where the tokenizer has none.

    begin: what every text begins with; None: nothing of its own.
    """

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    begin: int | None = None


@dataclass(frozen=True)
class WrittenTokenizer:
    """The tokenizer of an exported folder.

    notes: what its user must know, a sentence each. like_qwen: it cuts text as Qwen2's does, or there is none.
    """

    ids: TokenIds = TokenIds()
    notes: tuple[str, ...] = ()
    like_qwen: bool = True


def plain_architecture(model: ModelConfig, plan: LoopPlan, like_qwen: bool = True) -> tuple[str | None, str]:
    """The class of transformers that computes exactly this model (None: there is none), and why, in a phrase.

    Args:
        like_qwen: see ``WrittenTokenizer``.

    Raises:
        CheckpointError: not even the architecture ``sgt`` computes its feed-forward layers.
    """
    if plan.layers:
        return None, f"it loops in layers {', '.join(str(n) for n, _ in plan.layers)}"
    ffn = ffn_kind(model.activation)
    if ffn.hidden_act is None:
        raise CheckpointError(f"model.activation {model.activation}: no exported model can compute this kind")
    if model.normalization != "RMSNorm" or (ffn.gated, ffn.hidden_act) != (True, "silu"):
        return None, f"no plain decoder there has {model.normalization} with {model.activation}"
    if model.hidden_size % model.num_attention_heads:
        return None, f"transformers wants heads to divide hidden_size {model.hidden_size}"
    if model.norm_position == "output":
        if not model.norms_all_heads or model.add_qkv_bias or model.add_bias_linear:
            return None, "the plain decoder there with norms of outputs has q/k norms over all heads, and no biases"
        return "Olmo2ForCausalLM", "no layer loops, and it has norms of outputs, and q/k norms over all heads"
    if model.norms_all_heads:
        return None, "no plain decoder there has norms of inputs, and q/k norms over all heads"
    if model.qk_layernorm:
        if model.add_qkv_bias or model.add_bias_linear:
            return None, "no plain decoder there has q/k norms and these biases"
        return "Qwen3ForCausalLM", "no layer loops, and it has q/k norms"
    if model.add_qkv_bias and not model.add_bias_linear:
        if not like_qwen:
            return None, "transformers 5 reads any tokenizer beside a Qwen2 model as Qwen2's, which this one is not"
        return "Qwen2ForCausalLM", "no layer loops, and it has q/k/v biases"
    return "LlamaForCausalLM", "no layer loops"


def hf_config(
    model: ModelConfig,
    plan: LoopPlan,
    vocab_rows: int,
    dtype: str,
    tokens: TokenIds,
    form: Form = STANDARD,
    like_qwen: bool = True,
) -> dict[str, Any]:
    """The contents of ``config.json``.

    Args:
        vocab_rows: rows of the exported embedding.
        dtype: "fp32", "bf16" or "fp16", of the exported weights.
        form: of a model that is not plain.
        like_qwen: see ``WrittenTokenizer``.
    """
    common = {
        "vocab_size": vocab_rows,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": ffn_kind(model.activation).hidden_act,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": model.rotary_base,
        "max_position_embeddings": _context(model),
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        "torch_dtype": TORCH_NAMES[dtype],
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        # Not the padding token: it would switch off the training of that token's embedding.
        "pad_token_id": None,
    }
    plain, _ = plain_architecture(model, plan, like_qwen)
    if plain is None:
        scaled = {} if model.rotary_scaling is None else _rope(model)
        return form.head() | common | _sgt_tail(model, plan, form) | scaled
    family = plain.removesuffix("ForCausalLM").lower()
    biases = {
        "llama": {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear},
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"use_sliding_window": False, "attention_bias": False},
        "olmo2": {"attention_bias": False},
    }
    # transformers 4 reads rope_theta and rope_scaling, transformers 5 rope_parameters.
    scaling = {} if model.rotary_scaling is None else {"rope_scaling": model.rotary_scaling.formula()}
    return {"architectures": [plain], "model_type": family} | common | biases[family] | _rope(model) | scaling


def _rope(model: ModelConfig) -> dict[str, Any]:
    formula = {"rope_type": "default"} if model.rotary_scaling is None else model.rotary_scaling.formula()
    return {"rope_parameters": {**formula, "rope_theta": model.rotary_base}}


def _context(model: ModelConfig) -> int:
    """Tokens: what the model has been trained on, or what a scaled one was made for by whoever scaled it."""
    scaling = model.rotary_scaling
    return max(model.seq_length, (scaling and scaling.context_length) or 0)


def _sgt_tail(model: ModelConfig, plan: LoopPlan, form: Form) -> dict[str, Any]:
    passes = sum((1 + plan[n].loops) * (1 + plan[n].block_loops) for n in range(model.num_layers))
    depth = {"num_hidden_layers": passes, "sgt_num_layers": model.num_layers} if form.passes_are_layers else {}
    return {
        **depth,
        "gated_mlp": ffn_kind(model.activation).gated,
        "normalization": model.normalization,
        **({"norm_position": model.norm_position} if model.norm_position != "input" else {}),
        **CAUSAL.hf_fields(model),
        "mlp_bias": model.add_bias_linear,
        "sgt_loops": {str(n): _loop(layer) for n, layer in plan.layers},
    }


def _loop(layer: LayerPlan) -> dict[str, Any]:
    """``{"heads": [4, 11], "depth": 1}``, and what else the layer does."""
    entry: dict[str, Any] = {"heads": list(layer.kept_heads), "depth": layer.loops}
    if layer.other_gate:
        entry["other_gate"] = layer.other_gate
    if layer.block_loops:
        entry["block_loops"] = layer.block_loops
    return entry


def generation_config(tokens: TokenIds, unused_ids: range) -> dict[str, Any]:
    """The contents of ``generation_config.json``.

    ``bos_token_id`` is what ``generate`` without input begins with: what began a document in training, or the end of
    the one before it.

    Args:
        unused_ids: rows of padding, which no text has.
    """
    before = tokens.bos if tokens.eos is None else tokens.eos
    values: dict[str, Any] = {
        "bos_token_id": before if tokens.begin is None else tokens.begin,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
    }
    values = {name: value for name, value in values.items() if value is not None}
    return values | ({"suppress_tokens": list(unused_ids)} if unused_ids else {})
