"""Packed samples of real files: every token once, and what each of them says and predicts, by definition."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.config import Config
from megatron_sgt.data.gpt_dataset import build_datasets
from megatron_sgt.data.loader import TrainLoader
from megatron_sgt.data.packed_samples import PAD
from megatron_sgt.data.sources import validate_data
from megatron_sgt.errors import ConfigError, DataError
from tests.helpers.datasets import write_dataset

MakeConfig = Callable[..., Config]
T = 8
PACKED = {"data.packing": "best_fit", "data.reset_attention_mask": True}
ALL = {**PACKED, "data.reset_position_ids": True, "data.eod_mask_loss": True}
FIRST = 100
"""The first token of the data sets, so that none of them is the padding's."""
CORPORA = {
    "short": [1, 1, 2, 0, 3, 1, 0, 0, 2, 1, 4, 1, 1, 2, 2, 0, 5, 1, 1, 3],
    "long": [40, 0, 17, 8, 9, 16, 33, 7],
    "no padding": [8, 16, 3, 5],
    "one token": [1],
    "one longer than a sample": [9],
    **{f"random {seed}": random.Random(seed).choices([0, 1, 2, 3, 5, 7, 8, 9, 15, 30], k=40) for seed in range(6)},
}


def check(sample: dict[str, torch.Tensor], lengths: list[int], resets: bool, masks: bool) -> list[int]:
    """That a sample is packed documents as defined; returns its tokens without the padding."""
    owner = [number for number, size in enumerate(lengths) for _ in range(size)]
    real = int(sample["num_tokens"])
    tokens, labels, starts = (sample[key].tolist() for key in ("tokens", "labels", "document_starts"))
    assert tokens[real:] == [PAD] * (T - real) and starts[real:] == [real] * (T - real)
    for i in range(T):
        begins = i == 0 or i == real or (i < real and owner[tokens[i] - FIRST] != owner[tokens[i - 1] - FIRST])
        assert starts[i] == (i if begins else starts[i - 1])
        assert begins or i > real or tokens[i] == tokens[i - 1] + 1
        assert sample["position_ids"][i] == (i - starts[i] if resets else i)
        ends = i < real and owner[tokens[i] - FIRST] != [*owner, None][tokens[i] + 1 - FIRST]
        if i >= real or (ends and (masks or i == real - 1)):
            assert sample["loss_mask"][i] == 0
        else:
            assert sample["loss_mask"][i] == 1
            assert labels[i] == (tokens[i + 1] if ends else tokens[i] + 1)
    for start in set(starts[:real]):
        offset = tokens[start] - FIRST - sum(lengths[: owner[tokens[start] - FIRST]])
        assert offset % T == 0 and (offset == 0 or lengths[owner[tokens[start] - FIRST]] > T), "cut only if longer"
    return tokens[:real]


@pytest.mark.parametrize("name", CORPORA)
def test_an_epoch_is_every_token_once_in_whole_documents(name: str, tmp_path: Path, make_config: MakeConfig) -> None:
    lengths = CORPORA[name]
    prefix = write_dataset(tmp_path / "a", lengths, FIRST)
    for settings, resets, masks in ((PACKED, False, False), (ALL, True, True)):
        cfg = make_config(prefix, T, **{"data.split": "1"}, **settings)
        train, _, _ = build_datasets(cfg, None)
        for epoch in range(2):
            seen: Counter[int] = Counter()
            for index in range(epoch * len(train), (epoch + 1) * len(train)):
                sample = train[index]
                assert {key: (tuple(value.shape), value.dtype) for key, value in sample.items()} == {
                    "tokens": ((T,), torch.int64), "labels": ((T,), torch.int64), "loss_mask": ((T,), torch.float32),
                    "position_ids": ((T,), torch.int64), "document_starts": ((T,), torch.int32),
                    "num_tokens": ((), torch.int32),
                }  # fmt: skip
                seen.update(check(sample, lengths, resets, masks))
            assert seen == Counter(range(FIRST, FIRST + sum(lengths)))
        summary = validate_data(cfg)
        assert summary.train_samples == len(train) and summary.padding is not None
        assert summary.padding == pytest.approx(1 - sum(lengths) / (len(train) * T))
        assert f"padding {100 * summary.padding:.2f} %" in summary.line()


def orders(cfg: Config, count: int, split: int = 0) -> list[list[int]]:
    samples: Any = build_datasets(cfg, None)[split]
    return [samples[i]["tokens"].tolist() for i in range(count)]


def test_the_order_depends_on_seed_and_index_alone(tmp_path: Path, make_config: MakeConfig) -> None:
    a = write_dataset(tmp_path / "a", CORPORA["random 0"] * 3, FIRST)
    b = write_dataset(tmp_path / "b", CORPORA["random 1"] * 3, FIRST)
    settings = {**ALL, "train.train_iters": 5}
    one = orders(make_config([0.3, a, 0.7, b], T, **settings), 200)
    settings |= {"train.train_iters": 500, "data.data_cache_path": str(tmp_path / "cache")}
    again = make_config([0.3, a, 0.7, b], T, **settings)
    assert orders(again, 200) == one
    other = make_config([0.3, a, 0.7, b], T, **settings, **{"train.seed": 4321})
    assert orders(other, 200) != one
    assert orders(other, 20, split=1) == orders(again, 20, split=1), "validation does not follow the seed"
    loader = TrainLoader(build_datasets(again, None)[0], 2, 2, 0, 1, consumed_samples=12, num_workers=1)
    assert [row.tolist() for _ in range(4) for row in next(loader)["tokens"]] == one[12:20]


def test_packed_indices_have_a_cache_of_their_own(tmp_path: Path, make_config: MakeConfig) -> None:
    prefix = write_dataset(tmp_path / "a", CORPORA["random 2"], FIRST)
    folders: list[set[Path]] = []
    for settings in ({}, PACKED, ALL):
        cfg = make_config(prefix, T, **settings)
        build_datasets(cfg, None)
        folders.append(set(cfg.data_cache_dir.iterdir()))
    assert len(folders[0]) == 1 and len(folders[1]) == 2 and folders[2] == folders[1]
    [packed] = folders[1] - folders[0]
    assert sorted(file.name for file in packed.iterdir()) == [
        f"best_fit-{part}-{name}.npy" for part in ("train", "valid") for name in ("begins", "pieces")
    ]
    packed.joinpath("best_fit-train-pieces.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match="is no NumPy array"):
        build_datasets(cfg, None)


def test_what_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"packing: best_fit .*set data\.reset_attention_mask: true"):
        make_config("a", T, **{"data.packing": "best_fit"})
    prefix = write_dataset(tmp_path / "a", [0, 0, 5], FIRST)
    with pytest.raises(DataError, match="gets 2 of 3 documents with 0 tokens, less than one token"):
        build_datasets(make_config(prefix, T, **PACKED, **{"data.split": "2,1"}), None)
