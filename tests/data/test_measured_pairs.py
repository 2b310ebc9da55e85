from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sgt.config import Config, parse_config
from megatron_sgt.data.attended import attended
from megatron_sgt.data.indexed import sequence_lengths
from megatron_sgt.data.measured_pairs import measured_pairs
from megatron_sgt.errors import DataError
from tests.helpers.datasets import write_dataset
from tests.helpers.single import small_config

T = 16


def config(path: object, **data: Any) -> Config:
    fields = {"data_path": path, "split": "1", "reset_attention_mask": True, **data}
    return small_config(model={"seq_length": T}, data=fields)


def test_a_blend_is_weighted(tmp_path: Path) -> None:
    """Documents that fill half a sequence, and such that fill a whole one."""
    half, full = write_dataset(tmp_path / "half", [T // 2] * 41), write_dataset(tmp_path / "full", [T] * 41)
    found = measured_pairs(config([0.25, half, 0.75, full]))
    assert found is not None and found.padding == 0
    assert found.square(T) == pytest.approx(0.25 * T * T / 2 + 0.75 * T * T)
    assert measured_pairs(config(half, reset_attention_mask=False)) is None


def test_pieces_and_padding(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "x", [3, 9, 6, 11, 2, 14] * 20)
    shorter = [{"seq_length": T // 2, "until_steps": 2}]
    found = measured_pairs(config(prefix, seq_length_curriculum=shorter))
    lengths = sequence_lengths(prefix)
    assert found is not None
    for length in (T // 2, T):
        assert found.pairs(length) == attended(lengths, length, "concat", True).pairs
    packed = measured_pairs(config(prefix, packing="best_fit"))
    assert packed is not None and packed.padding == attended(lengths, T, "best_fit", True).padding > 0


def test_phases_count_by_what_they_read(tmp_path: Path) -> None:
    """Four steps of the first blend at T, two of the other one at T / 2 and four at T."""
    half, full = write_dataset(tmp_path / "half", [T // 2] * 41), write_dataset(tmp_path / "full", [T] * 41)
    phases = [
        {"until_steps": 4},
        {"until_steps": 6, "data_path": full, "seq_length": T // 2},
        {"data_path": [0.5, half, 0.5, full], "seq_length": T},
    ]
    given = config(half).model_dump() | {"phases": phases}
    given["train"]["train_iters"] = 10
    found = measured_pairs(parse_config(given))
    assert found is not None
    assert found.share(T // 2) == pytest.approx(1)
    assert found.share(T) == pytest.approx((0.5 + (0.5 + 1) / 2) / 2, abs=0.01)


def test_the_training_split_alone_is_measured_and_of_a_large_one_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write_dataset(tmp_path / "x", [T] * 200 + [1] * 200)
    found = measured_pairs(config(prefix, split="50,50"))
    assert found is not None and found.share(T) == 1
    many = write_dataset(tmp_path / "many", np.random.default_rng(0).integers(1, 2 * T, 8000).tolist())
    exact = measured_pairs(config(many))
    monkeypatch.setattr("megatron_sgt.data.measured_pairs.SAMPLED_DOCUMENTS", 2048)
    sampled = measured_pairs(config(many))
    assert exact is not None and sampled is not None and sampled != exact
    assert sampled.pairs(T) == pytest.approx(exact.pairs(T), rel=0.05)
    with pytest.raises(DataError, match="no indexed data set at"):
        measured_pairs(config(str(tmp_path / "none")))
    with pytest.raises(DataError, match=r"data\.data_path is empty"):
        measured_pairs(config([]))
    empty = write_dataset(tmp_path / "empty", [0])
    with pytest.raises(DataError, match="has no token"):
        measured_pairs(config(empty))
