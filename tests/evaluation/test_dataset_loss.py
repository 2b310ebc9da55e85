"""Loss on an indexed data set, against sums written out here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_sgt.config.data import DataConfig, TokenizerConfig
from megatron_sgt.data.tokenizer import build_tokenizer
from megatron_sgt.errors import DataError
from megatron_sgt.evaluation.dataset_loss import ALL, DatasetLoss, WhichSamples, dataset_loss, open_samples
from tests.helpers.datasets import write_dataset
from tests.helpers.grown_run import write_words
from tests.helpers.tokenizers import write_sentencepiece

VOCAB_SIZE, ROWS, LENGTH = 50, 56, 8
CPU = torch.device("cpu")


def logits(tokens: Tensor) -> Tensor:
    """Some function of the tokens, with rows beyond the vocabulary that are likely."""
    rows = torch.arange(ROWS).float()
    return torch.cos(tokens.unsqueeze(-1) * 0.3 + rows * 0.7) + (rows >= VOCAB_SIZE)


def which(prefix: str, part: str, num_samples: int | None = None) -> WhichSamples:
    return WhichSamples(DataConfig(data_path=(prefix,), split="50,25,25"), part, LENGTH, num_samples)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_mean_over_all_tokens(batch_size: int, tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "data", [20] * 8, vocab_size=VOCAB_SIZE)
    samples, count = open_samples(which(prefix, "valid"), VOCAB_SIZE, None, str(tmp_path / "cache"))
    found = dataset_loss(logits, samples, count, VOCAB_SIZE, batch_size, CPU)
    assert (found.samples, found.tokens, count) == (4, 32, 4)
    read = [samples[i] for i in range(4)]
    seen = {int(token) for sample in read for token in sample["tokens"]}
    assert seen <= set(range(30, 50)) | set(range(20)), "documents 4 and 5 of 8: tokens 80 to 119, modulo 50"
    scores = torch.cat([logits(sample["tokens"]) for sample in read]).double()
    labels = torch.cat([sample["labels"] for sample in read])
    for loss, width in ((found.loss, VOCAB_SIZE), (found.padded_loss, ROWS)):
        chosen = scores[:, :width].log_softmax(-1)[torch.arange(32), labels]
        assert loss == pytest.approx(-float(chosen.mean()), abs=1e-6)
    assert found.padded_loss is not None and found.padded_loss > found.loss
    assert found.bits_per_byte is None


def test_parts_and_numbers_of_samples(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "data", [20] * 8, vocab_size=160)
    cache = str(tmp_path / "cache")
    counts = {p: open_samples(which(prefix, p), 160, None, cache)[1] for p in ("train", "valid", "test", ALL)}
    assert counts == {"train": 9, "valid": 4, "test": 4, ALL: 19}
    assert open_samples(which(prefix, ALL, 3), 160, None, cache)[1] == 3
    seen = open_samples(which(prefix, ALL), 160, None, cache)[0]
    assert len({int(token) for i in range(19) for token in seen[i]["tokens"]}) == 19 * LENGTH, "each token once"


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "data", [20, 20, 20, 4], vocab_size=VOCAB_SIZE)
    cache = str(tmp_path / "cache")
    with pytest.raises(DataError, match=r"the test split .* holds no whole sample of 8 tokens"):
        open_samples(which(prefix, "test"), VOCAB_SIZE, None, cache)
    with pytest.raises(DataError, match="token id 49"):
        open_samples(which(prefix, ALL), 20, None, cache)
    with pytest.raises(DataError, match="no indexed data set"):
        open_samples(which(str(tmp_path / "nothing"), ALL), 20, None, cache)


def test_bits_per_byte_count_the_bytes_of_the_text(tmp_path: Path) -> None:
    wanted = TokenizerConfig(type="sentencepiece", model=str(write_sentencepiece(tmp_path / "sp.model")))
    tokenizer = build_tokenizer(wanted)
    prefix = write_words(tmp_path / "words", wanted)
    samples, _ = open_samples(which(prefix, ALL), tokenizer.vocab_size, tokenizer, str(tmp_path / "cache"))
    uniform = lambda tokens: torch.zeros(*tokens.shape, tokenizer.vocab_size)  # noqa: E731
    found = dataset_loss(uniform, samples, 10, tokenizer.vocab_size, 4, CPU, tokenizer)
    labels = [token for i in range(10) for token in samples[i]["labels"].tolist()]
    size = sum(len(tokenizer.piece(token)) for token in labels if token != tokenizer.eod)  # ASCII, and ▁ for a space
    assert found.text_bytes == size and tokenizer.eod in labels
    assert found.bits_per_byte == pytest.approx(80 * math.log2(300) / size)
    assert found.perplexity == pytest.approx(300)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    one = TokenizerConfig(type="sentencepiece", model=str(write_sentencepiece(tmp_path / "one.model")))
    other = TokenizerConfig(type="sentencepiece", model=str(write_sentencepiece(tmp_path / "other.model", 310)))
    prefix = write_words(tmp_path / "words", one)
    with pytest.raises(DataError, match="was tokenized with sentencepiece"):
        open_samples(which(prefix, ALL), 400, build_tokenizer(other), str(tmp_path / "cache"))


def test_a_loss_without_text_has_no_bits_per_byte() -> None:
    assert DatasetLoss(1, 8, 2.0, None, 0).bits_per_byte is None
