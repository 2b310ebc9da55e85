"""One validation set: the same batches every time, its extent counted once, over all ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.loader import EvalLoader
from megatron_sgt.data.tokenizer import Tokenizer, build_tokenizer
from megatron_sgt.evaluation.text_bytes import TextBytes
from megatron_sgt.evaluation.validation_set import ValidationSet
from tests.helpers.fake_groups import fake_groups
from tests.helpers.tokenizers import TEXT, write_sentencepiece

LENGTH = 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = write_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "a.model")
    return build_tokenizer(TokenizerConfig(type="sentencepiece", model=str(path)))


class Samples(Dataset[dict[str, Tensor]]):
    """Sample i: the i-th ``LENGTH`` tokens of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids = torch.tensor(tokenizer.encode(f"{TEXT} {TEXT} {TEXT}"))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.ids[index * LENGTH : (index + 1) * LENGTH + 1]
        return {"tokens": row[:-1], "labels": row[1:], "loss_mask": torch.ones(LENGTH)}


class Model(torch.nn.Module):
    """Has a loss of 2 on every token; counts its calls."""

    calls = 0

    def inputs(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        return batch

    def forward(self, tokens: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        self.calls += 1
        return 2 * loss_mask.sum() / loss_mask.sum().clamp(min=1)


def test_what_a_validation_finds(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three samples in two steps: the last place is none. The other rank has 6 tokens of 30 bytes, and a loss of 2."""
    samples, model, alive = Samples(tokenizer), Model(), []
    loader = EvalLoader(samples, 1, 2, 0, 1, 2, num_samples=3)
    counter = TextBytes(tokenizer)
    one = ValidationSet("wiki", loader, 3, 3, fake_groups(), counter, lambda: alive.append(True))
    text = counter.count(int(samples.ids[0]), samples.ids[1 : 3 * LENGTH + 1].tolist())
    for _ in range(2):
        found = one.measure(model)
        assert found.loss == pytest.approx(2.0) and found.perplexity == pytest.approx(math.exp(2.0))
        assert found.bits_per_byte == pytest.approx(2.0 * 3 * LENGTH / (math.log(2) * text))
    assert (len(one), one.tokens, model.calls, len(alive)) == (4, 18, 8, 8)
    assert found.fields("ema_").keys() == {"ema_loss", "ema_perplexity", "ema_bits_per_byte"}

    def all_reduce(value: Tensor, group: Any = None, op: Any = None) -> None:
        if op is None:
            value += torch.tensor([12.0, 6.0] if value.is_floating_point() else [6, 30])

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    both = ValidationSet("wiki", loader, 3, 3, fake_groups(dp_size=2), counter)
    assert both.measure(model).bits_per_byte == pytest.approx(2.0 * 24 / (math.log(2) * (text + 30)))
    assert both.tokens == 24


def test_without_a_tokenizer_there_are_no_bytes(tokenizer: Tokenizer) -> None:
    one = ValidationSet(None, EvalLoader(Samples(tokenizer), 1, 1, 0, 1, 2), 2, 2, fake_groups())
    found = one.measure(Model())
    assert found.bits_per_byte is None and found.fields().keys() == {"loss", "perplexity"}
    assert one.tokens == 2 * LENGTH
