"""From the names of the exported tensors to those of vLLM's fused projections. Imports nothing of vLLM."""

from __future__ import annotations

_QKV = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
_GATE_UP = {"gate_proj": 0, "up_proj": 1}


def stacked(name: str, gated: bool) -> tuple[str, str | int | None]:
    """The parameter that holds an exported tensor, and its part of it (None: the parameter is this tensor)."""
    layer, _, tail = name.rpartition(".self_attn.")
    if layer:
        projection, _, kind = tail.partition(".")
        if projection in _QKV:
            return f"{layer}.self_attn.qkv_proj.{kind}", _QKV[projection]
    layer, _, tail = name.rpartition(".mlp.")
    if layer and gated:
        projection, _, kind = tail.partition(".")
        if projection in _GATE_UP:
            return f"{layer}.mlp.gate_up_proj.{kind}", _GATE_UP[projection]
    return name, None
