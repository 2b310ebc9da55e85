"""The table of families against the code that reads them, transformers, and the page that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.architecture import plain_architecture
from megatron_sgt.export.forms import form_of
from megatron_sgt.export.hf import families
from megatron_sgt.export.hf.families import read_model
from megatron_sgt.export.hf.known_families import IMPORTED, REFUSED, WHY_REFUSED, Imported, table
from megatron_sgt.growth import LoopPlan
from tests.helpers.hf_folders import build_hf_model

PAGE = Path(__file__).parents[3] / "docs" / "huggingface.md"


def test_it_names_what_can_be_imported_and_nothing_twice() -> None:
    imported = [name for one in IMPORTED for name in one.types]
    assert {name for name in families._FAMILIES if form_of(name) is None} == set(imported)
    every = imported + [name for one in REFUSED for name in one.types]
    assert len(set(every)) == len(every) and set(every) <= set(CONFIG_MAPPING), "model types of transformers"


@pytest.mark.parametrize("family", IMPORTED, ids=lambda family: family.types[0])
def test_a_plain_export_is_of_the_class_that_it_says(family: Imported, tmp_path: Path) -> None:
    build_hf_model(family.types[0]).config.save_pretrained(tmp_path)
    model = ModelConfig.model_validate({**read_model(tmp_path).fields, "seq_length": 8})
    assert plain_architecture(model, LoopPlan.empty(model.num_layers))[0] == family.exported


@pytest.mark.parametrize("name", WHY_REFUSED)
def test_what_is_refused_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{name}"}}')
    with pytest.raises(CheckpointError) as refused:
        read_model(tmp_path)
    assert f"cannot be imported: {WHY_REFUSED[name]}; known types: llama" in str(refused.value)


def test_the_page_shows_it() -> None:
    rows = table()
    assert "\n".join(rows) in PAGE.read_text(encoding="utf-8"), "write this into the page:\n" + "\n".join(rows)
