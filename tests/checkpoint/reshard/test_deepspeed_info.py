import re
from typing import Any

import pytest

from megatron_sgt.arch.weights import weights
from megatron_sgt.checkpoint.reshard.deepspeed_info import universal_info
from tests.helpers.deepspeed_files import odd_config

PATTERNS = {
    "vocab": "vocabulary_parameter_patterns",
    "replicated": "tp_replicated_parameter_patterns",
    "columns": "parameter_with_row_parallelism_patterns",
    "rows": "parameter_with_2_sub_params_cat_dim_0",
}
"""Split in the weight table -> DeepSpeed's key. The others are joined along dimension 0 by default."""


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"qk_layernorm": False, "add_qkv_bias": True},
        {"normalization": "LayerNorm", "add_bias_linear": True, "untie_embeddings_and_output_weights": False},
        {"activation": "gelu", "add_bias_linear": True},
    ],
)
def test_patterns_say_what_the_weight_table_says(model: dict[str, Any]) -> None:
    config = odd_config(**model)
    info = universal_info(config.model)
    patterns = {split: info[key] for split, key in PATTERNS.items()}
    used = set()
    for weight in weights(config.model):
        found = [(k, p) for k, ps in patterns.items() for p in ps if re.match(p, f"gpt.{weight.megatron}")]
        one = weight.split == "rows" and len(weight.hf) == 1
        assert [split for split, _ in found] == ([] if weight.split == "qkv" or one else [weight.split]), weight
        used |= {pattern for _, pattern in found}
    assert used == {pattern for some in patterns.values() for pattern in some}, "DeepSpeed refuses unused ones"


def test_no_row_of_the_vocabulary_is_cut_off() -> None:
    info = universal_info(odd_config().model)
    assert info["original_vocab_size"] == info["padded_vocab_size"] == 24
