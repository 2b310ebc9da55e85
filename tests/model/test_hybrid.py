"""The way from GPTModel, which Megatron-Core deprecates from 0.19 on, to HybridModel stays open (docs/design.md)."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.config import Config
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.model.gpt import LanguageModel
from megatron_sgt.model.initial_weights import draw_weights
from megatron_sgt.model.mcore_config import transformer_config
from megatron_sgt.model.spec import decoder_spec
from tests.helpers.single import random_batch, single_groups, single_model, small_config

block = pytest.importorskip("megatron.core.models.hybrid.hybrid_block")  # from 0.18 on
model = pytest.importorskip("megatron.core.models.hybrid.hybrid_model")


class Stack(block.HybridStack):
    """Its own last norm is Transformer Engine's; this project's stands under the name that GPTModel gives it."""

    def __init__(self, *args: Any, norm: type[torch.nn.Module], **kwargs: Any) -> None:
        super().__init__(*args, post_layer_norm=False, **kwargs)
        config = self.config
        self.final_layernorm = norm(config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.final_layernorm(super().forward(*args, **kwargs))


def hybrid_of(config: Config, like: LanguageModel) -> LanguageModel:
    """The HybridModel of ``config``: a stack of attention layers, each of which holds its MLP."""
    groups = single_groups(config)
    spec = decoder_spec(config, like.meter, HeadLayout.of(config.model))
    stack = block.HybridStackSubmodules(attention_layer=spec.layer_specs[0])
    hybrid = model.HybridModel(
        config=transformer_config(config, "fp32", groups.device),
        hybrid_stack_spec=ModuleSpec(module=Stack, params={"norm": spec.layer_norm}, submodules=stack),
        vocab_size=config.model.padded_vocab_size(),
        max_sequence_length=config.model.seq_length,
        hybrid_layer_pattern="*" * config.model.num_layers,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
    )
    draw_weights(hybrid, config, groups)
    return LanguageModel(hybrid, like.meter)


@pytest.mark.parametrize("untied", [True, False], ids=["untied", "tied"])
def test_the_same_model_bit_for_bit(untied: bool) -> None:
    config = small_config(model={"untie_embeddings_and_output_weights": untied, "num_query_groups": 2})
    ours = single_model(config)
    theirs = hybrid_of(config, ours)
    window, kept = LayerPlan(1, (0, 2), other_gate=0.5), LayerPlan(2, (1, 3))
    losses, gradients = [], []
    for one in (ours, theirs):
        start = {name: p.detach().clone() for name, p in one.named_parameters()}
        apply_plan(one, LoopPlan(config.model.num_layers, ((1, window), (2, kept))))
        loss = one(**random_batch(config))
        loss.backward()
        losses.append(loss.detach())
        gradients.append((start, {name: p.grad for name, p in one.named_parameters()}))
    assert torch.equal(losses[0], losses[1])
    for left, right in zip(*gradients, strict=True):
        assert list(left) == list(right)
        assert [name for name in left if not torch.equal(left[name], right[name])] == []
