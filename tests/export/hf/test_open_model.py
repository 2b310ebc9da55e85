"""Checkpoints and folders opened as models of transformers: the same function, fp32 rotations, damage refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sgt.errors import CheckpointError, DataError
from megatron_sgt.export.hf.modeling_sgt import SGTForCausalLM
from megatron_sgt.export.hf.open_model import is_hf_folder, open_model
from tests.helpers import grown_run
from tests.helpers.hf_folders import VOCAB_SIZE, save_hf_model
from tests.helpers.tokenizers import write_hf_tokenizer, write_sentencepiece

TOKENS = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def test_a_checkpoint_is_its_export() -> None:
    checkpoint, folder = open_model(grown_run.checkpoints()), open_model(grown_run.export())
    assert isinstance(checkpoint.model, SGTForCausalLM) and checkpoint.model.config.sgt_loops
    assert torch.equal(logits(checkpoint.model), logits(folder.model))
    assert (
        (checkpoint.vocab_size, checkpoint.context) == (folder.vocab_size, folder.context) == (300, grown_run.CONTEXT)
    )
    text = "the quick  brown fox, 42 é"
    assert checkpoint.tokenizer(text)["input_ids"] == folder.tokenizer(text)["input_ids"]
    assert not checkpoint.model.training and not is_hf_folder(grown_run.checkpoints())


def test_a_step_can_be_chosen_and_padding_kept() -> None:
    opened = open_model(grown_run.checkpoints(), step=9, keep_padding=True)
    assert opened.name.endswith("global_step9")
    assert (opened.vocab_size, opened.model.config.vocab_size) == (300, grown_run.PADDED)


def test_code_of_a_folder_runs_only_when_trusted(tmp_path: Path) -> None:
    # transformers registers the first model class that it loads for a configuration class, whose module is named by the
    # folder's name and code: under a name that another test of this process trusts, this folder's code would not run.
    folder = Path(shutil.copytree(grown_run.export(), tmp_path / "with_code_of_its_own"))
    code = folder / "modeling_sgt.py"
    code.write_text(code.read_text() + "\nSGTForCausalLM.theirs = True\n")
    assert not hasattr(open_model(folder).model, "theirs")
    trusted = open_model(folder, trust_remote_code=True).model
    assert trusted.theirs and torch.equal(logits(trusted), logits(open_model(folder).model))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_rotary_frequencies_stay_fp32(name: str, tmp_path: Path) -> None:
    model = save_hf_model(tmp_path, name)
    opened = open_model(tmp_path, dtype="bf16").model
    assert opened.dtype == torch.bfloat16
    frequencies = opened.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, model.model.rotary_emb.inv_freq)
    assert torch.equal(logits(open_model(tmp_path).model), logits(model))


def test_weights_that_are_missing_are_not_drawn_anew(tmp_path: Path) -> None:
    save_hf_model(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file({**weights, "model.extra": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match=r"1 missing keys in its weights: model\.norm\.weight"):
        open_model(tmp_path)


def test_weights_of_another_size_are_named(tmp_path: Path) -> None:
    save_hf_model(tmp_path, "llama")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"vocab_size": VOCAB_SIZE + 8}))
    named = r"2 mismatched keys in its weights: lm_head\.weight, model\.embed_tokens\.weight; config\.json and weights"
    with pytest.raises(CheckpointError, match=named):
        open_model(tmp_path)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    save_hf_model(tmp_path, "llama", shard_size="20KB")
    shard = next(tmp_path.glob("model-00002-*"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        open_model(tmp_path)


def test_places_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot be loaded as a causal language model|in its weights"):
        open_model(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "llama")
    write_hf_tokenizer(tmp_path / "hf")
    with pytest.raises(DataError, match=f"the tokenizer has 280 ids, but .* knows {VOCAB_SIZE}"):
        open_model(tmp_path / "hf")
    other = write_sentencepiece(tmp_path / "other.model", 310)
    with pytest.raises(DataError, match="310"):
        open_model(grown_run.checkpoints(), tokenizer=other)
    with pytest.raises(DataError, match="does not exist"):
        open_model(grown_run.checkpoints(), tokenizer=tmp_path / "nothing")
