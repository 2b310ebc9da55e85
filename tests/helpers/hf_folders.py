"""Tiny models that transformers itself makes, with random weights, saved as their users would."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 96
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama_tied_biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16, "rope_theta": 1e6}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 32,
            "rope_theta": 5e5,
        },
    ),
}
"""Name -> what its classes begin with, and its settings beside SHAPE."""
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_3.1": ("Llama", {
        "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 16},
    }),
    "llama_3.2": ("Llama", {
        "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 16},
        "tie_word_embeddings": True, "head_dim": 16,
    }),
    "llama_linear": ("Llama", {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "qwen2_yarn": ("Qwen2", {
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    }),
    "qwen3_yarn": ("Qwen3", {
        "head_dim": 16, "rope_theta": 1e6,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.2,
            "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False,
        },
    }),
}  # fmt: skip
"""The same with scaled rotary positions, from a context of 16 tokens to one of 64."""


def build_hf_model(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A randomly initialised model of FAMILIES or SCALED, biases and norms too, in evaluation mode."""
    family, own = {**FAMILIES, **SCALED}[name]
    config = getattr(transformers, f"{family}Config")(**deepcopy({**SHAPE, **own, **settings}))
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def save_hf_model(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **settings: Any
) -> Any:
    """Save a model of ``build_hf_model`` to ``folder``; returns it."""
    model = build_hf_model(name, dtype, **settings)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model
