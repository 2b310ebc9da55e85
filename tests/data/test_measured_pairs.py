from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sgt.config import Config
from megatron_sgt.data.attended import attended
from megatron_sgt.data.indexed import sequence_lengths
from megatron_sgt.data.measured_pairs import measured_pairs
from megatron_sgt.errors import DataError
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.flops import batch_flops, flops_between
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


def test_a_phase_has_the_pairs_of_its_own_blend(tmp_path: Path) -> None:
    """FLOPs of steps in both phases are the sum of what each blend's documents make."""
    half, full = write_dataset(tmp_path / "half", [T // 2] * 41), write_dataset(tmp_path / "full", [T] * 41)
    two = small_config(
        model={"seq_length": T},
        train={"train_iters": 10},
        data={"data_path": half, "split": "1", "reset_attention_mask": True},
        phases=[{"until_steps": 4}, {"data_path": full}],
    )
    found = measured_pairs(two)
    assert found is not None
    assert [found.at(step).square(T) for step in (1, 4, 5, 10)] == [T * T / 2, T * T / 2, T * T, T * T]
    plan = LoopPlan.empty(two.model.num_layers)
    first, second = (batch_flops(two, plan, T, two.train.global_batch_size, found.at(step)).model for step in (1, 5))
    assert first < second and flops_between(two, plan, 3, 6, found) == 2 * first + 2 * second
