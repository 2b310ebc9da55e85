"""Ids, generation settings and the name of an imported model: kept through training, and in the export again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.checkpoint import layout
from megatron_sgt.config import load_config
from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.architecture import TokenIds
from megatron_sgt.export.checked import checked_export
from megatron_sgt.export.from_hf import import_model
from megatron_sgt.export.hf.open_model import open_model
from megatron_sgt.export.inherited import generation_values
from megatron_sgt.export.to_hf import ExportOptions, export_checkpoint
from tests.helpers.hf_folders import save_hf_model
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import pretrain, write_tiny_data

IDS = {"bos_token_id": 5, "eos_token_id": [7, 9, 11], "pad_token_id": 3}
GENERATION = {**IDS, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 2.0}


def written(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def write_source(folder: Path, family: str = "llama") -> None:
    """A folder as Llama-3's: several tokens end a text, and it has settings of its own to sample with."""
    save_hf_model(folder, family, bos_token_id=5, eos_token_id=[7, 9], pad_token_id=3)
    values = GENERATION | {"transformers_version": "4.43.0"}
    (folder / "generation_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_they_come_out_as_they_came_in(family: str, tmp_path: Path) -> None:
    write_source(tmp_path / "hf", family)
    import_model(tmp_path / "hf", tmp_path / "in", base_model="some/model")
    _, parity = checked_export(tmp_path / "in", tmp_path / "out", options=ExportOptions(dtype="fp32"))
    assert parity is not None and parity.passed, "settings of generation are no part of the comparison"
    before, after = written(tmp_path / "hf", "config.json"), written(tmp_path / "out", "config.json")
    assert {name: after[name] for name in IDS} == {name: before[name] for name in IDS}
    assert written(tmp_path / "out", "generation_config.json") == GENERATION
    for path in (tmp_path / "in", tmp_path / "out"):
        found = open_model(path).model.generation_config
        assert (found.eos_token_id, found.temperature, found.pad_token_id) == ([7, 9, 11], 0.6, 3)


def test_training_keeps_them(tmp_path: Path) -> None:
    write_source(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "in", base_model="some/model")
    config = load_config(
        tmp_path / "in/run.yaml",
        [
            f"data.data_path={write_tiny_data(tmp_path)}", f"logging.run_dir={tmp_path / 'run'}",
            "parallel.device=cpu", "model.seq_length=16", "train.global_batch_size=2", "train.train_iters=1",
            "optim.lr_warmup_iters=0",
        ],
    )  # fmt: skip
    run_on_ranks(1, pretrain, config)
    saved = layout.read_json(tmp_path / "run/checkpoints/global_step1/sgt_state.json")
    assert saved["imported"]["base_model"] == "some/model"
    export_checkpoint(tmp_path / "run/checkpoints", tmp_path / "out")
    assert written(tmp_path / "out", "generation_config.json") == GENERATION
    assert written(tmp_path / "out", "config.json")["eos_token_id"] == [7, 9]
    assert "The run began from `some/model`." in (tmp_path / "out/README.md").read_text()


def test_a_model_without_ids_takes_the_tokenizers(tmp_path: Path) -> None:
    assert generation_values({}, TokenIds(1, 2, 0), range(5, 7)) == {
        "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0, "suppress_tokens": [5, 6],
    }  # fmt: skip
    inherited = {"token_ids": {"eos_token_id": 4}, "generation_config": {"suppress_tokens": [1]}}
    assert generation_values(inherited, TokenIds(1, 2, 0), range(5, 7)) == {
        "bos_token_id": 2, "eos_token_id": [4, 2], "pad_token_id": 0, "suppress_tokens": [1, 5, 6],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "is no JSON object"),
        ('{"eos_token_id": "</s>"}', "eos_token_id is </s>, not an id or a list of ids"),
        ('{"eos_token_id": [1, true]}', "not an id"),
    ],
)
def test_what_cannot_be_kept(text: str, said: str, tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "llama")
    (tmp_path / "hf/generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        import_model(tmp_path / "hf", tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_ids_without_a_row_mean_none(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "llama", bos_token_id=1, eos_token_id=2)
    (tmp_path / "hf/generation_config.json").write_text('{"pad_token_id": -1, "eos_token_id": [2, 128001]}')
    import_model(tmp_path / "hf", tmp_path / "in")
    export_checkpoint(tmp_path / "in", tmp_path / "out")
    found = written(tmp_path / "out", "generation_config.json")
    assert found == {"bos_token_id": 1, "eos_token_id": [2]}
