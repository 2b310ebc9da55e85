"""What the plugin can serve, said before a weight is loaded. Imports nothing of vLLM."""

from __future__ import annotations

from typing import Any

from vllm_sgt.passes import KEPT, kv_option


def rope_parameters(config: Any) -> dict[str, Any]:
    """The rotary settings as vLLM's ``get_rope`` takes them, from either version of transformers' fields."""
    found = dict(getattr(config, "rope_scaling", None) or {}) | dict(getattr(config, "rope_parameters", None) or {})
    kind = found.pop("type", "default")
    return {"rope_type": kind} | found | {"rope_theta": found.get("rope_theta") or config.rope_theta}


def check(config: Any, vllm_config: Any, ranks: int) -> None:
    """Refuse what would be computed wrong.

    Raises:
        ValueError: a division among ``ranks`` that the heads do not allow, or settings that exclude each other.
    """
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % ranks or (groups % ranks and ranks % groups):
        raise ValueError(
            f"{heads} query heads in {groups} key/value groups cannot be divided among {ranks} tensor-parallel ranks; "
            "choose another tensor_parallel_size"
        )
    if getattr(config, "sliding_window", None):
        raise ValueError(f"sliding_window {config.sliding_window}: exported SGT models attend to all positions")
    if kv_option(config) == KEPT and getattr(vllm_config, "kv_transfer_config", None) is not None:
        raise ValueError(
            'sgt_kv_heads "kept" gives loops fewer key/value heads than layers, which a KV connector does not expect; '
            'use "all" with kv_transfer_config'
        )
