from typing import Any

import pytest
import torch

from megatron_sgt.config.optim import OptimConfig
from megatron_sgt.optim.param_groups import parameter_groups
from tests.helpers.single import single_model, small_config


def optim(**changes: Any) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 1e-3, "weight_decay": 0.3, **changes})


def names(model: torch.nn.Module, group: dict[str, Any]) -> set[str]:
    of = {id(p): name for name, p in model.named_parameters()}
    found = [of[id(p)] for p in group["params"]]
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_decays_as_in_the_paper(tied: bool) -> None:
    model = single_model(small_config(model={"untie_embeddings_and_output_weights": not tied}))
    (group,) = parameter_groups(model, optim())
    assert group["weight_decay"] == 0.3
    assert names(model, group) == {name for name, _ in model.named_parameters()}


def test_matrices_alone() -> None:
    config = small_config(model={"add_bias_linear": True, "normalization": "LayerNorm", "qk_layernorm": True})
    model = single_model(config)
    decay, no_decay = parameter_groups(model, optim(weight_decay_on="matrices"))
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.3, 0.0)
    assert (decay["name"], no_decay["name"]) == ("decay", "no_decay")
    assert names(model, no_decay) == {
        name for name, _ in model.named_parameters() if name.endswith("bias") or "norm" in name
    }
    assert names(model, decay) | names(model, no_decay) == {name for name, _ in model.named_parameters()}
    assert not names(model, decay) & names(model, no_decay)


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
    model[1].weight.requires_grad_(False)
    for where in ("all", "matrices"):
        (group,) = parameter_groups(model, optim(weight_decay_on=where))
        assert names(model, group) == {"0.weight"}


def test_what_decays() -> None:
    """Through the optimizer: without a gradient signal a decaying parameter shrinks by lr x decay, others stay."""
    model = torch.nn.Linear(2, 2)
    groups = parameter_groups(model, optim(weight_decay_on="matrices"))
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(groups, lr=0.5).step()
    torch.testing.assert_close(model.weight.detach(), before[0] * (1 - 0.5 * 0.3))
    assert torch.equal(model.bias.detach(), before[1])
