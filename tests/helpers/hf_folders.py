"""Tiny models that transformers itself makes, with random weights, saved as their users would."""

from __future__ import annotations

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
    "olmo3": ("Olmo3", {"layer_types": ["full_attention"] * 3, "rope_theta": 1e4}),
}
"""Name -> what its classes begin with, and its settings beside SHAPE."""


def build_hf_model(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A randomly initialised model of FAMILIES, biases and norms too, in evaluation mode."""
    family, own = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **own, **settings})
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
