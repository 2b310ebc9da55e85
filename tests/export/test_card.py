"""The card of an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sgt.checkpoint.surgery.offline import grow_checkpoint
from megatron_sgt.export.architecture import TokenIds, hf_config, plain_architecture
from megatron_sgt.export.card import model_card
from megatron_sgt.export.forms import FORMS, Form
from megatron_sgt.export.from_hf import import_model
from megatron_sgt.export.source import open_checkpoint
from megatron_sgt.export.to_hf import ExportOptions, export_checkpoint
from megatron_sgt.growth import LoopPlan
from megatron_sgt.stages.operators import OPERATORS
from tests.helpers.checkpoints import write_grown_checkpoint
from tests.helpers.hf_folders import save_hf_model


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
    assert "## Growth of the model" in card and "| 7 | `g_stack` | num_layers 4 -> 8 |" in card
    assert plain_architecture(source.config.model, plan) == ("LlamaForCausalLM", "no layer loops")


def front_matter(card: str) -> dict[str, Any]:
    """What a hub reads; the text begins with it."""
    begin, values, _ = card.split("---\n", 2)
    assert begin == ""
    return yaml.safe_load(values)


@pytest.mark.parametrize("license_id", [None, "apache-2.0", "no"])
def test_the_front_matter_says_what_was_named(license_id: str | None, tmp_path: Path) -> None:
    source = open_checkpoint(write_grown_checkpoint(tmp_path))
    plan = source.plan()
    config = hf_config(source.config.model, plan, 128, "bf16", TokenIds())
    card = model_card(source, plan, config, False, license_id=license_id)
    expected = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sgt", "megatron_sgt"]}
    assert front_matter(card) == expected | ({} if license_id is None else {"license": license_id})
    assert ("None was named" in card) == (license_id is None)
    assert "eprint        = {2603.23998}" in card and "@software{megatron-sgt," in card and "author" not in card


def test_an_import_is_called_one_and_has_no_training(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "models--some--llama" / "snapshots" / "1", "llama")
    import_model(tmp_path / "models--some--llama" / "snapshots" / "1", tmp_path / "in")
    export_checkpoint(tmp_path / "in", tmp_path / "out", options=ExportOptions(license="llama3"))
    card = (tmp_path / "out/README.md").read_text()
    assert front_matter(card)["base_model"] == "some/llama" and front_matter(card)["license"] == "llama3"
    assert "from `some/llama`; no step has been trained since" in card
    assert "## Training" not in card and str(tmp_path) not in card
    assert "AutoTokenizer" not in card, "the folder has none"


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_names_the_code_that_it_brings(form: Form, tmp_path: Path) -> None:
    source = open_checkpoint(write_grown_checkpoint(tmp_path))
    plan = source.plan()
    card = model_card(source, plan, hf_config(source.config.model, plan, 128, "bf16", TokenIds(), form), False, ())
    assert form.about in card and 'AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)' in card
    assert all(f"`{name}`" in card for name in form.files) and "trust_remote_code=True" in card
    assert front_matter(card)["library_name"] == "transformers" and f"| architecture | {form.architecture} |" in card
