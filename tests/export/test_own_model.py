"""The project's model alone in a process, with the weights of any checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_sgt.export.own_model import own_model
from megatron_sgt.export.source import open_checkpoint
from megatron_sgt.model.apply_plan import executed_plan
from tests.helpers.exports import export_config, mild_state, write_run
from tests.helpers.reference_sgt import forward
from tests.helpers.variants import reference_settings


def test_it_is_the_reference_with_these_weights(tmp_path: Path) -> None:
    """From four tensor-parallel ranks' files, under an environment that speaks of another launcher."""
    config = export_config("multi_head")
    write_run(tmp_path, config, (4, 2, 3))
    source = open_checkpoint(tmp_path)
    plan = source.plan()
    model = own_model(source, plan, torch.float32)
    assert executed_plan(model) == plan and not model.training
    gates = torch.zeros(4, 4)
    gates[3, [0, 3]] = gates[1, [1, 2]] = 1.0
    tokens = torch.randint(128, (2, 20), generator=torch.Generator().manual_seed(1))
    params = mild_state(config)["weights"]
    expected, _ = forward(params, tokens, reference_settings(config), [0, 1, 0, 2], gates, {})
    assert (model.logits(tokens) - expected).abs().max() < 1e-4


def test_weights_are_rounded_to_the_stored_type(tmp_path: Path) -> None:
    config = export_config("multi_head")
    write_run(tmp_path, config)
    source = open_checkpoint(tmp_path)
    model = own_model(source, source.plan(), torch.bfloat16)
    weight = model.gpt.embedding.word_embeddings.weight
    expected = mild_state(config)["weights"]["model.embed_tokens.weight"]
    assert weight.dtype == torch.float32 and torch.equal(weight.detach(), expected.bfloat16().float())
