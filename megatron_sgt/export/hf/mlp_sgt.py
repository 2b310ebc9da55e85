"""The feed-forward part of a layer. Shapes: B batch, S tokens, D hidden."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_sgt import SGTConfig


class SGTMLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, config: SGTConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, S, D]."""
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class SGTGatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)); a class of its own, with one expression, which vLLM fuses."""

    def __init__(self, config: SGTConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, S, D]."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def mlp_of(config: SGTConfig) -> nn.Module:
    """The feed-forward layer of a model."""
    return SGTGatedMLP(config) if config.gated_mlp else SGTMLP(config)
