"""How each kind of feed-forward layer is built of Megatron-Core's modules (its record is in ``arch.ffn``)."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_sgt.arch.ffn import ffn_kind
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.model.linear import LoopingRowParallelLinear, MaskedColumnParallelLinear
from megatron_sgt.ops.swiglu import swiglu


class SwiGLU(torch.nn.Module):
    """[S, B, 2 F] -> [S, B, F], as Megatron-Core's own, bit for bit."""

    def __init__(self, **_: object) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """silu(first half) · second half."""
        return swiglu(x)


def mlp_spec(activation_module: type[torch.nn.Module] | None = None) -> ModuleSpec:
    """Megatron-Core's MLP."""
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=MaskedColumnParallelLinear,
            activation_func=activation_module,
            linear_fc2=LoopingRowParallelLinear,
        ),
    )


@dataclass(frozen=True)
class FFNModule:
    """How one kind of feed-forward layer is built.

    ``spec``: what stands in the slot ``mlp`` of a layer. ``activation``, ``gated``: as Megatron-Core's MLP wants them.
    ``compiled``: when Megatron-Core has a compiled activation for it, which ``train.fusions`` turns on.
    ``own_activation``: the spec has an activation module, used where nothing is compiled.
    """

    spec: ModuleSpec
    activation: Callable[[Tensor], Tensor]
    gated: bool = False
    compiled: Literal["always", "with a bias", "never"] = "never"
    own_activation: bool = False

    def compiles(self, bias: bool) -> bool:
        """Whether Megatron-Core has a compiled activation for layers with or without ``bias``."""
        return self.compiled == "always" or (self.compiled == "with a bias" and bias)


FFN_MODULES = {
    "swiglu": FFNModule(mlp_spec(SwiGLU), F.silu, gated=True, compiled="always", own_activation=True),
    "gelu": FFNModule(mlp_spec(), F.gelu, compiled="with a bias"),
}


def ffn_module(model: ModelConfig) -> FFNModule:
    """How the feed-forward layers of ``model`` are built."""
    name = ffn_kind(model.activation).module
    return FFN_MODULES[name] if name in FFN_MODULES else pkgutil.resolve_name(name)
