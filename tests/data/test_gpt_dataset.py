from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt import extensions
from megatron_sgt.config import Config, DataConfig
from megatron_sgt.data.gpt_dataset import DATASETS, BlendedSamples, build_datasets, open_validation_sets
from megatron_sgt.data.sources import validate_data
from megatron_sgt.errors import DataError
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.choices import built_in
from tests.helpers.datasets import write_dataset
from tests.helpers.ranks import run_on_ranks

MakeConfig = Callable[..., Config]


class Numbers:
    """A stand-in of one epoch whose elements tell where they come from."""

    def __init__(self, name: int, length: int) -> None:
        self.name = name
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor([self.name, index]), "labels": torch.tensor([index, index])}


def blended(lengths: list[int], weights: list[float], seed: int = 1, shuffle: bool = True) -> BlendedSamples:
    parts = [Numbers(name, length) for name, length in enumerate(lengths)]
    return BlendedSamples(parts, weights, seed, shuffle, 1000, [f"set{name}" for name in range(len(lengths))])


def test_every_epoch_shows_every_sample_once_in_a_new_order() -> None:
    samples = blended([50], [1.0])
    assert len(samples) == 50
    epochs = [[samples.locate(i)[1] for i in range(50 * e, 50 * e + 50)] for e in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_a_pure_function_of_seed_and_index() -> None:
    forward = blended([30, 7], [0.7, 0.3])
    backward = blended([30, 7], [0.7, 0.3])
    order = [forward.locate(i) for i in range(500)]
    assert [backward.locate(i) for i in reversed(range(500))] == order[::-1]
    assert [blended([30, 7], [0.7, 0.3], seed=2).locate(i) for i in range(500)] != order
    assert forward.locate(10**15)[0] in (0, 1)


def test_blend_draws_by_weight_and_goes_through_each_set() -> None:
    samples = blended([30, 7], [0.7, 0.3])
    order = [samples.locate(i) for i in range(1000)]
    assert Counter(d for d, _ in order)[1] == pytest.approx(300, abs=1)
    from_second = [j for d, j in order if d == 1]
    for start in range(0, 280, 7):
        assert sorted(from_second[start : start + 7]) == list(range(7))


def test_unshuffled_order_repeats() -> None:
    samples = blended([3], [1.0], shuffle=False)
    assert [samples.locate(i)[1] for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    with pytest.raises(IndexError):
        samples.locate(-1)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    part = Numbers(0, 2000)
    samples = BlendedSamples([part], [1.0], 1, False, 1000, ["corpus"])
    assert samples[999]["tokens"].tolist() == [0, 999]
    with pytest.raises(DataError, match="corpus holds token id 1000, but the vocabulary has 1000 ids"):
        _ = samples[1000]


def test_samples_of_real_files(tmp_path: Path, make_config: MakeConfig) -> None:
    prefix = write_dataset(tmp_path / "a", [20] * 20)
    train, valid, test = build_datasets(make_config(prefix), None)
    assert valid is not None and test is None
    assert (len(train), len(valid)) == (359 // 16, 39 // 16)
    sample = train[0]
    assert {key: (tuple(value.shape), value.dtype) for key, value in sample.items()} == {
        "tokens": ((16,), torch.int64),
        "labels": ((16,), torch.int64),
        "loss_mask": ((16,), torch.float32),
        "position_ids": ((16,), torch.int64),
    }
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
    assert sample["loss_mask"].tolist() == [1.0] * 16
    assert sample["position_ids"].tolist() == list(range(16))
    seen = [int(t) for i in range(len(train)) for t in train[i]["tokens"]]
    assert len(set(seen)) == len(seen) and max(seen) < 360, "training and validation do not overlap"
    assert all(int(t) >= 360 for i in range(len(valid)) for t in valid[i]["labels"])


def test_order_does_not_depend_on_the_length_of_the_run(tmp_path: Path, make_config: MakeConfig) -> None:
    a = write_dataset(tmp_path / "a", [20] * 20)
    b = write_dataset(tmp_path / "b", [30] * 9, start=500)
    orders = []
    for train_iters, global_batch_size in ((5, 2), (500, 8)):
        cfg = make_config(
            [0.3, a, 0.7, b],
            **{"train.train_iters": train_iters, "train.global_batch_size": global_batch_size},
        )
        train, _, _ = build_datasets(cfg, None)
        orders.append(torch.stack([train[i]["tokens"] for i in range(200)]))
    assert torch.equal(orders[0], orders[1])
    other, _, _ = build_datasets(make_config([0.3, a, 0.7, b], **{"train.seed": 4321}), None)
    assert not torch.equal(torch.stack([other[i]["tokens"] for i in range(200)]), orders[0])


def test_validation_sets_are_whole_and_no_seed_changes_them(tmp_path: Path, make_config: MakeConfig) -> None:
    prefix = write_dataset(tmp_path / "a", [20] * 20)
    named = {"wiki": write_dataset(tmp_path / "wiki", [30] * 9, start=500), "code": prefix}
    found = []
    for seed in (1, 2):
        cfg = make_config(prefix, **{"data.valid": named, "train.seed": seed, "data.allow_validation_leak": True})
        sets = open_validation_sets(cfg, None)
        assert {name: len(samples) for name, samples in sets.items()} == {"wiki": 269 // 16, "code": 399 // 16}
        found.append([sets["wiki"][i]["tokens"] for i in range(16)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    seen = {int(token) for sample in found[0] for token in sample}
    assert len(seen) == 16 * 16 and min(seen) >= 500, "of all documents, each token once"
    assert len(list((tmp_path / "run/data_cache").glob("wiki-*"))) == 1, "one index for both seeds"
    assert open_validation_sets(make_config(prefix), None) == {}


def test_a_corpus_rebuilt_under_the_same_name(tmp_path: Path, make_config: MakeConfig) -> None:
    """Megatron's own cache would serve the indices of the old one."""
    prefix = write_dataset(tmp_path / "a", [20] * 20)
    cfg = make_config(prefix)
    build_datasets(cfg, None)
    for suffix in (".bin", ".idx", ".json"):
        Path(prefix + suffix).unlink()
    write_dataset(tmp_path / "a", [7] * 100)
    train, _, _ = build_datasets(cfg, None)
    assert len(train) == (7 * 90 - 1) // 16
    assert len({int(t) for i in range(len(train)) for t in train[i]["tokens"]}) == 16 * len(train)


def open_on_a_rank(info: RankInfo, good: Config, bad: Config) -> tuple[torch.Tensor, str]:
    """Forty samples of training and one of validation; what is said of data that is not there."""
    train, valid, _ = build_datasets(good, None)
    tokens = torch.stack([train[i]["tokens"] for i in range(40)] + [valid[0]["tokens"]])
    with pytest.raises(DataError) as caught:
        build_datasets(bad, None)
    return tokens, str(caught.value)


def test_two_ranks_build_one_cache_and_fail_together(tmp_path: Path, make_config: MakeConfig) -> None:
    cfg, bad = make_config(write_dataset(tmp_path / "a", [20] * 20)), make_config(str(tmp_path / "nope"))
    (tokens, message), (other_tokens, other_message) = run_on_ranks(2, open_on_a_rank, cfg, bad, backend="gloo")
    assert torch.equal(tokens, other_tokens)
    assert "no indexed data set" in message and message == other_message
    assert len(list(cfg.data_cache_dir.iterdir())) == 1
    alone, _, _ = build_datasets(cfg, None)
    assert torch.equal(torch.stack([alone[i]["tokens"] for i in range(40)]), tokens[:40])


def test_a_registered_data_set_makes_the_samples(make_config: MakeConfig) -> None:
    def numbers(cfg: Config, tokenizer: Any) -> Any:
        return Numbers(0, cfg.model.seq_length), None, None

    extensions.register("datasets", "numbers", numbers)
    try:
        config = make_config([], **{"data.dataset": "numbers"})
        train, valid, test = build_datasets(config, None)
        assert "'numbers', read when the run starts" in validate_data(config).line()
    finally:
        extensions.unregister("datasets", "numbers")
    assert (type(train), valid, test) == (Numbers, None, None)


def test_the_table_has_what_the_configuration_knows() -> None:
    assert built_in(DataConfig, "dataset") == tuple(DATASETS)
