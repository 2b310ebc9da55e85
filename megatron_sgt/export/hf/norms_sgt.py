"""The norms of a decoder layer: of what attention and MLP read, or of what they add.

Shapes: B batch, S tokens, D hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from .attention_sgt import SGTRMSNorm
from .configuration_sgt import SGTConfig


def norm_of(config: SGTConfig) -> nn.Module:
    """A norm of hidden states."""
    kind = SGTRMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.rms_norm_eps)


class SGTNorms:
    """What a layer has of norms, under Llama's names, or OLMo-2's where they are of outputs.

    x + F(Norm(x)) is x + ``attention_output(F(attention_input(x)))`` either way; the same of the MLP.
    """

    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    post_feedforward_layernorm: nn.Module

    def make_norms(self, config: SGTConfig) -> None:
        """Called in ``__init__``."""
        self.norms_outputs = config.norm_position == "output"
        if self.norms_outputs:
            self.post_attention_layernorm, self.post_feedforward_layernorm = norm_of(config), norm_of(config)
        else:
            self.input_layernorm, self.post_attention_layernorm = norm_of(config), norm_of(config)

    def attention_input(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> what the attention, or one of its loops, reads."""
        return x if self.norms_outputs else self.input_layernorm(x)

    def attention_output(self, out: Tensor) -> Tensor:
        """out [B, S, D] of the attention -> what is added to its input."""
        return self.post_attention_layernorm(out) if self.norms_outputs else out

    def mlp_output(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> what the MLP adds to it."""
        if self.norms_outputs:
            return self.post_feedforward_layernorm(self.mlp(x))
        return self.mlp(self.post_attention_layernorm(x))
