"""Rotary positions of exported models, scaled by transformers' own formulas where ``rope_parameters`` say so.

Shapes: B batch, S tokens, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_sgt import SCALED, SGTConfig


class SGTRotaryEmbedding(nn.Module):
    """cos and sin of the positions.

    ``frequencies``: radians per token [H / 2] fp32 where they are scaled. No buffer: it would be cast with the model,
    and lost in a load through the meta device.

    Raises:
        ValueError: frequencies of this ``rope_type`` depend on the length of a text.
    """

    def __init__(self, config: SGTConfig) -> None:
        super().__init__()
        self.theta, self.size = config.rope_parameters["rope_theta"], config.head_dim
        self.frequencies: Tensor | None = None
        self._copied: Tensor | None = None  # on the device where they are used
        self.attention_scaling = 1.0
        kind = config.rope_parameters["rope_type"]
        if kind not in ("default", *SCALED):  # set after the configuration was checked
            raise ValueError(f"rope_type {kind!r}: choose default, {', '.join(SCALED)}")
        if kind != "default":
            cpu = torch.device("cpu")
            with cpu:
                frequencies, self.attention_scaling = ROPE_INIT_FUNCTIONS[kind](config, cpu)
            self.frequencies = frequencies.float()

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, S, H] of positions [B, S], in the type of x.

        Angles are computed in fp32 whatever the model was cast to: in bf16, positions above 256 would collide.
        """
        angles = position_ids[..., None].float() * self._radians(position_ids.device)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if self.attention_scaling != 1.0:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)

    def _radians(self, device: torch.device) -> Tensor:
        if self.frequencies is not None:
            if self.frequencies.device == device:
                return self.frequencies
            if self._copied is None or self._copied.device != device:
                # Once: a copy from the host in every forward could not be in a CUDA graph.
                self._copied = self.frequencies.to(device)
            return self._copied
        exponent = torch.arange(0, self.size, 2, dtype=torch.float32, device=device) / self.size
        return 1.0 / self.theta**exponent
