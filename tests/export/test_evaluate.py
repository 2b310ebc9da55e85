"""A checkpoint, its export and its run measure the same loss."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_sgt.errors import ConfigError, DataError
from megatron_sgt.evaluation.dataset_loss import DatasetLoss
from megatron_sgt.export.evaluate import evaluate, logits_of, which_samples
from megatron_sgt.export.hf.open_model import open_model
from tests.helpers import grown_run
from tests.helpers.hf_folders import save_hf_model
from tests.helpers.hf_models import hf_model
from tests.helpers.runs import write_tiny_data
from tests.helpers.tokenizers import write_sentencepiece


@cache
def as_the_run_validates() -> DatasetLoss:
    opened = open_model(grown_run.checkpoints(), keep_padding=True)
    return evaluate(opened, which_samples(opened, (), None, None, None, None), None, 3)


def test_a_checkpoint_is_measured_as_its_run_validates() -> None:
    found = as_the_run_validates()
    logged = grown_run.validation_losses()[18]
    assert found.samples == 8 and found.padded_loss is not None
    assert found.padded_loss == pytest.approx(logged, abs=1e-5)
    assert 0 < found.padded_loss - found.loss < 1, "rows of padding take a share of the softmax"
    assert found.bits_per_byte is not None and 0 < found.bits_per_byte < 8


def test_an_export_measures_the_same() -> None:
    opened = open_model(grown_run.export())
    wanted = which_samples(opened, (grown_run.data_prefix(),), "90,10,0", "valid", None, 8)
    found = evaluate(opened, wanted, None, 4)
    assert found.loss == pytest.approx(as_the_run_validates().loss, abs=1e-5)
    assert replace(found, loss=0.0) == replace(as_the_run_validates(), loss=0.0, padded_loss=None)


def test_given_data_counts_as_one() -> None:
    opened = open_model(grown_run.checkpoints())
    data = (grown_run.data_prefix(),)
    assert which_samples(opened, data, None, None, None, None).part == "all"
    assert which_samples(opened, data, None, "valid", 16, None).data.split == "90,10,0"
    assert which_samples(opened, (), None, "train", None, None).num_samples is None
    assert which_samples(opened, (), None, None, None, 3).num_samples == 3


@pytest.mark.parametrize("masked", [True, False])
def test_documents_of_a_sample(masked: bool) -> None:
    """As if each were alone, or with positions that begin again alone: then the second still sees the first."""
    model, generator = hf_model("window"), torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (2, 9), generator=generator)
    starts = torch.tensor([[0] * 4 + [4] * 5, [0] * 9])
    positions = torch.arange(9) - starts
    with torch.no_grad():
        found = logits_of(model, masked)(tokens, starts, positions)
        alone = logits_of(model, masked)(tokens[:1, 4:])
        other = logits_of(model, masked)(tokens[1:])
    assert torch.allclose(found[1:], other, atol=5e-5)
    assert torch.allclose(found[:1, 4:], alone, atol=5e-5) == masked


def test_a_run_is_measured_with_its_documents() -> None:
    opened = open_model(grown_run.checkpoints())
    assert opened.source is not None
    told = {"reset_attention_mask": True, "packing": "best_fit"}
    config = opened.source.config
    data = config.data.model_copy(update=told)
    object.__setattr__(opened, "source", replace(opened.source, config=config.model_copy(update={"data": data})))
    chosen = which_samples(opened, (), None, None, None, None).data
    assert chosen.reset_attention_mask and chosen.packing == "best_fit" and not chosen.reset_position_ids
    given = which_samples(opened, (grown_run.data_prefix(),), None, None, None, None).data
    assert not given.tells_documents


def test_another_tokenizer_than_the_datas_is_refused(tmp_path: Path) -> None:
    opened = open_model(grown_run.export())
    wanted = which_samples(opened, (grown_run.data_prefix(),), None, None, None, 2)
    other = write_sentencepiece(tmp_path / "other.model", 290)
    with pytest.raises(DataError, match="was tokenized with"):
        evaluate(opened, wanted, other, 2)


def test_a_folder_without_tokenizer_measures_tokens(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "llama")
    opened = open_model(tmp_path / "hf")
    found = evaluate(opened, which_samples(opened, (write_tiny_data(tmp_path),), None, None, 16, 4), None, 2)
    assert found.tokens == 64 and found.text_bytes is None
    with pytest.raises(ConfigError, match="names no data set to measure on; give --data PREFIX"):
        which_samples(opened, (), None, None, None, None)
