"""What samples say of their documents, against a definition by hand on random corpora."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgt import extensions
from megatron_sgt.config import Config
from megatron_sgt.data.gpt_dataset import build_datasets
from megatron_sgt.data.loader import EvalLoader, TrainLoader
from megatron_sgt.data.pieces import cut
from megatron_sgt.errors import DataError
from tests.helpers.datasets import write_dataset

MakeConfig = Callable[..., Config]
T = 8
ALL = {"data.reset_attention_mask": True, "data.reset_position_ids": True, "data.eod_mask_loss": True}
CORPORA = {
    "short": [1, 1, 2, 0, 3, 1, 0, 0, 2, 1, 4, 1, 1, 2, 2, 0, 5, 1, 1, 3],
    "long": [40, 0, 17, 8, 9, 16, 33, 7],
    "aligned": [8] * 12,
    "a label of the next document": [9, 8, 8, 8, 8, 7, 1, 8],
    "one": [100],
    "empty first and last": [0, 0, 20, 5, 0],
    **{f"random {seed}": random.Random(seed).choices([0, 1, 2, 3, 5, 8, 9, 30], k=40) for seed in range(4)},
}


def owners(lengths: list[int]) -> list[int]:
    """The document of each token; tokens count up through the corpus."""
    return [number for number, size in enumerate(lengths) for _ in range(size)]


def by_hand(tokens: list[int], last_label: int, owner: list[int]) -> dict[str, list[int]]:
    """Starts, positions and weights of a sequence, token by token. A document begins where its first token is."""
    starts = [0]
    for i in range(1, len(tokens)):
        starts.append(starts[-1] if owner[tokens[i]] == owner[tokens[i - 1]] else i)
    labels = [*tokens[1:], last_label]
    weights = [int(owner[token] == owner[label]) for token, label in zip(tokens, labels, strict=True)]
    return {
        "document_starts": starts, "position_ids": [i - s for i, s in enumerate(starts)], "loss_mask": weights,
    }  # fmt: skip


@pytest.mark.parametrize("name", CORPORA)
def test_samples_are_those_of_the_definition(name: str, tmp_path: Path, make_config: MakeConfig) -> None:
    lengths = CORPORA[name]
    prefix = write_dataset(tmp_path / "a", lengths)
    split = {"data.split": "1"}
    plain, _, _ = build_datasets(make_config(prefix, T, **split), None)
    told, _, _ = build_datasets(make_config(prefix, T, **split, **ALL), None)
    owner = owners(lengths)
    assert len(told) == len(plain) == (sum(lengths) - 1) // T
    seen: Counter[int] = Counter()
    for index in range(2 * len(plain)):
        before, sample = plain[index], told[index]
        assert before.keys() == {"tokens", "labels", "loss_mask", "position_ids"}
        assert sample.keys() == before.keys() | {"document_starts", "num_tokens"}
        assert torch.equal(sample["tokens"], before["tokens"]) and torch.equal(sample["labels"], before["labels"])
        expected = by_hand(sample["tokens"].tolist(), int(sample["labels"][-1]), owner)
        assert {key: sample[key].tolist() for key in expected} == expected
        assert sample["num_tokens"] == T and sample["num_tokens"].dtype == torch.int32
        assert (sample["document_starts"].dtype, sample["position_ids"].dtype) == (torch.int32, torch.int64)
        assert before["loss_mask"].sum() == T and before["position_ids"].tolist() == list(range(T))
        seen.update(sample["tokens"].tolist())
    assert set(seen.values()) == {2}, "each token once an epoch"


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"data.eod_mask_loss": True}, {"loss_mask"}),
        ({"data.reset_attention_mask": True}, {"document_starts", "num_tokens"}),
        ({"data.reset_position_ids": True}, {"document_starts", "num_tokens", "position_ids"}),
    ],
)
def test_each_setting_alone(
    settings: dict[str, bool], changed: set[str], tmp_path: Path, make_config: MakeConfig
) -> None:
    prefix = write_dataset(tmp_path / "a", [3, 2, 6, 2, 5, 20])
    plain, valid, _ = build_datasets(make_config(prefix, T, **{"data.split": "1"}), None)
    told, _, _ = build_datasets(make_config(prefix, T, **{"data.split": "1"}, **settings), None)
    assert valid is None
    found = {
        key
        for i in range(len(told))
        for key, value in told[i].items()
        if key not in plain[i] or not torch.equal(value, plain[i][key])
    }
    assert found == changed


def test_micro_batches_through_workers_and_from_any_sample(tmp_path: Path, make_config: MakeConfig) -> None:
    prefix = write_dataset(tmp_path / "a", CORPORA["short"] * 8)
    train, valid, _ = build_datasets(make_config(prefix, T, **ALL), None)
    whole = TrainLoader(train, 2, 2, 0, 1)
    batches = [next(whole) for _ in range(8)]
    assert {key: tuple(value.shape) for key, value in batches[0].items()} == {
        "tokens": (2, T), "labels": (2, T), "loss_mask": (2, T), "position_ids": (2, T),
        "document_starts": (2, T), "num_tokens": (2,),
    }  # fmt: skip
    resumed = TrainLoader(train, 2, 2, 0, 1, consumed_samples=8, num_workers=1)
    for expected, got in zip(batches[4:], resumed, strict=False):
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    evaluated = list(EvalLoader(valid, 2, 1, 0, 1, num_steps=2))
    assert evaluated[0]["num_tokens"].tolist() == [T, T] and evaluated[1]["document_starts"].shape == (2, T)


class OwnSamples:
    """A registered data set that does as it is told, or not."""

    def __init__(self, more: dict[str, Tensor]) -> None:
        self.more = more

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": torch.arange(T), **self.more}


STARTS, COUNT = torch.zeros(T, dtype=torch.int32), torch.tensor(T, dtype=torch.int32)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "'own' have no document_starts"),
        ({"document_starts": STARTS}, "'own' have no num_tokens"),
        ({"document_starts": STARTS.long(), "num_tokens": COUNT}, r"'own' have \(8,\) int64 as document_starts, int32"),
        ({"document_starts": STARTS, "num_tokens": COUNT[None]}, r"\(1,\) int32 as num_tokens, int32 of shape \(\)"),
        ({"document_starts": STARTS, "num_tokens": COUNT}, None),
    ],
)
def test_registered_samples_must_tell_their_documents(
    more: dict[str, Tensor], said: str | None, make_config: MakeConfig
) -> None:
    def build(cfg: Config, tokenizer: Any) -> Any:
        return OwnSamples(more), None, None

    extensions.register("datasets", "own", build)
    try:
        assert build_datasets(make_config([], T, **{"data.dataset": "own"}), None)[0].more is more
        config = make_config([], T, **{"data.dataset": "own", "data.reset_position_ids": True})
        if said is None:
            assert build_datasets(config, None)[0].more is more
        else:
            with pytest.raises(DataError, match=said):
                build_datasets(config, None)
    finally:
        extensions.unregister("datasets", "own")


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("reset", [True, False])
def test_pieces_are_sequences_of_their_own(pieces: int, reset: bool) -> None:
    starts = torch.tensor([[0, 0, 2, 2, 2, 2, 2, 7], [0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 3, 4, 4, 4, 4]]).int()
    place = torch.arange(T)
    batch = {
        "tokens": torch.arange(3 * T).view(3, T),
        "position_ids": place - starts if reset else place.repeat(3, 1),
        "document_starts": starts,
        "num_tokens": torch.tensor([8, 8, 3], dtype=torch.int32),
    }
    got = cut(batch, pieces)
    length, row = T // pieces, 0
    for sample in range(3):
        for begin in range(0, T, length):
            old = starts[sample, begin : begin + length].tolist()
            expected = [max(0, start - begin) for start in old]
            assert got["document_starts"][row].tolist() == expected
            positions = [i - start if reset else i for i, start in enumerate(expected)]
            assert got["position_ids"][row].tolist() == positions
            assert got["num_tokens"][row] == min(length, max(0, (8, 8, 3)[sample] - begin))
            row += 1
    assert len(got["tokens"]) == row and {got[key].dtype for key in ("document_starts", "num_tokens")} == {torch.int32}
