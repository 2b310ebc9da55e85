"""The feed-forward part of exported models, against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_sgt.export.hf.mlp_sgt import mlp_of
from tests.helpers.hf_models import gap, hf_config


@pytest.mark.parametrize("gated", [True, False])
def test_the_formula(gated: bool) -> None:
    mlp = mlp_of(hf_config(gated_mlp=gated, hidden_act="gelu", mlp_bias=True))
    x = torch.randn(2, 3, 48)
    weights = dict(mlp.named_parameters())

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    inner = F.gelu(project("gate_proj", x)) * project("up_proj", x) if gated else F.gelu(project("up_proj", x))
    assert ("gate_proj.weight" in weights) == gated
    assert gap(mlp(x), project("down_proj", inner)) < 1e-6
