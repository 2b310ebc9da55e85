"""The card of an exported folder."""

from __future__ import annotations

from pathlib import Path

from megatron_sgt.checkpoint.surgery.offline import grow_checkpoint
from megatron_sgt.export.architecture import TokenIds, hf_config, plain_architecture
from megatron_sgt.export.card import model_card
from megatron_sgt.export.source import open_checkpoint
from megatron_sgt.growth import LoopPlan
from megatron_sgt.stages.operators import OPERATORS
from tests.helpers.checkpoints import write_grown_checkpoint


def test_it_tells_how_the_model_grew(tmp_path: Path) -> None:
    source = open_checkpoint(write_grown_checkpoint(tmp_path), keep_padding=True)
    model = source.config.model
    for gates in (False, True):
        plan = source.plan(gates)
        card = model_card(source, plan, hf_config(model, plan, 128, "bf16", TokenIds()), gates)
        assert card.startswith("---\nlibrary_name: transformers\n")
        assert "step 7 of 10, 448 tokens, growth phase `selecting`" in card
        assert "| 3 | 2 | 2 | 0, 3 |\n| 1 | 6 | 1 | 1, 2 |\n" in card
        assert "trust_remote_code=True" in card and "`modeling_sgt.py`" in card
        assert ("the other heads loop at 0.5 in layer 1" in card) == gates
        assert ("exported with the gates of inference" in card) != gates


def test_a_plain_model_needs_no_trust(tmp_path: Path) -> None:
    source = open_checkpoint(write_grown_checkpoint(tmp_path))
    plan = LoopPlan.empty(4)
    card = model_card(source, plan, hf_config(source.config.model, plan, 128, "bf16", TokenIds()), False)
    assert "trust_remote_code" not in card and "Growth history" not in card
    assert "| architecture | LlamaForCausalLM |" in card


def test_it_names_how_the_model_became_larger(tmp_path: Path) -> None:
    write_grown_checkpoint(tmp_path / "old")
    made = grow_checkpoint(tmp_path / "old", tmp_path / "new", OPERATORS["g_stack"], {"factor": 2})
    source, plan = open_checkpoint(made.folder), LoopPlan.empty(8)
    card = model_card(source, plan, hf_config(source.config.model, plan, 128, "bf16", TokenIds()), False)
    assert "The model became deeper or wider in training: by `g_stack` after step 7." in card
    assert plain_architecture(source.config.model, plan) == ("LlamaForCausalLM", "no layer loops")
