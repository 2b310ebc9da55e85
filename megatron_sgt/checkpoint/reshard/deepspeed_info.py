"""What DeepSpeed's ds_to_universal must know of Megatron-Core's parameters, for those who use it.

This project reshards by itself; the info makes its ZeRO-1 and ZeRO-2 checkpoints readable by the stock tool.
"""

from __future__ import annotations

from typing import Any

from megatron_sgt.config.model import ModelConfig

UNIVERSAL_INFO = "universal_checkpoint_info"
"""Key of DeepSpeed's client state."""


def universal_info(model: ModelConfig) -> dict[str, Any]:
    """Patterns of parameter names (for ``re.match``) by how tensor-parallel ranks share them.

    Every pattern matches some parameter of ``model``, as DeepSpeed insists. What matches none is joined along
    dimension 0: linear_qkv, interleaved by query group.
    """
    rows = model.padded_vocab_size()
    replicated = [r".*layernorm\.weight"]
    if model.normalization == "LayerNorm":
        replicated.append(r".*layernorm\.bias")
    if model.add_bias_linear:
        replicated.append(r".*linear_(proj|fc2)\.bias")
    vocabulary = [r".*word_embeddings\.weight"]
    if model.untie_embeddings_and_output_weights:
        vocabulary.append(r".*output_layer\.weight")
    halves = [r".*linear_fc1\.weight"] if model.activation == "swiglu" else []
    if halves and model.add_bias_linear:
        halves.append(r".*linear_fc1\.bias")
    return {
        "universal_checkpoint_version": 0.2,
        "vocabulary_parameter_patterns": vocabulary,
        # The padding rows are part of the softmax; the tool would cut them off.
        "original_vocab_size": rows,
        "padded_vocab_size": rows,
        "tp_replicated_parameter_patterns": replicated,
        "parameter_with_row_parallelism_patterns": [r".*linear_(proj|fc2)\.weight"],
        "parameter_with_2_sub_params_cat_dim_0": halves,
    }
