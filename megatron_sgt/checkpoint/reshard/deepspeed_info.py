"""What DeepSpeed's ds_to_universal must know of Megatron-Core's parameters, for those who use it.

This project reshards by itself; the info makes its ZeRO-1 and ZeRO-2 checkpoints readable by the stock tool, those of a
pipeline too: DeepSpeed notes the sizes in each file, and the weights of every stage have the names of the whole model.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_sgt.arch.weight import Weight
from megatron_sgt.arch.weights import weights
from megatron_sgt.config.model import ModelConfig

UNIVERSAL_INFO = "universal_checkpoint_info"
"""Key of DeepSpeed's client state."""


def universal_info(model: ModelConfig) -> dict[str, Any]:
    """Patterns of parameter names (for ``re.match``) by how tensor-parallel ranks share them.

    Every pattern matches some parameter of ``model``, as DeepSpeed insists. What matches none is joined along
    dimension 0: linear_qkv, interleaved by query group, and one matrix split by rows.
    """
    rows = model.padded_vocab_size()
    patterns: dict[str, dict[str, None]] = {}
    for weight in weights(model):
        patterns.setdefault(_sharing(weight), {})[_pattern(weight.megatron)] = None
    return {
        "universal_checkpoint_version": 0.2,
        # The padding rows are part of the softmax; the tool would cut them off.
        "original_vocab_size": rows,
        "padded_vocab_size": rows,
        **{key: list(patterns.get(sharing, ())) for sharing, key in _KEYS.items()},
    }


_KEYS = {
    "vocab": "vocabulary_parameter_patterns",
    "replicated": "tp_replicated_parameter_patterns",
    "columns": "parameter_with_row_parallelism_patterns",
    "rows of 2": "parameter_with_2_sub_params_cat_dim_0",
}


def _sharing(weight: Weight) -> str:
    return f"rows of {len(weight.hf)}" if weight.split == "rows" else weight.split


def _pattern(name: str) -> str:
    return r".*\." + re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name))
