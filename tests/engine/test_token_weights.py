"""Weights of micro-batches; what they do to a step is in test_documents.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_sgt.data.loader import MicroBatch
from megatron_sgt.engine.token_weights import weighted
from tests.helpers.fake_groups import fake_groups


def micro_batches(*counts: int) -> list[MicroBatch]:
    return [{"loss_mask": (torch.arange(8) < n).float().view(2, 4)} for n in counts]


def weights(*counts: int, dp_size: int = 1) -> list[float]:
    groups = fake_groups(dp_size=dp_size)
    return [float(one["weight"]) for _, one in weighted(micro_batches(*counts), True, groups)]


def test_a_micro_batch_weighs_as_many_tokens_as_it_has() -> None:
    assert weights(6, 2, 4) == [1.5, 0.5, 1.0]


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_equal_ones_weigh_one_exactly(tokens: int) -> None:
    assert weights(*[tokens] * 7) == [1.0] * 7


def test_all_data_parallel_ranks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda total, group: total.add_(12.0))  # the other rank's
    assert weights(4, 8, dp_size=2) == [4 / 6, 8 / 6]


def test_a_step_without_a_token_weighs_nothing() -> None:
    assert weights(0, 0) == [0.0, 0.0]


def test_even_ones_are_read_one_by_one() -> None:
    read = []

    def batches() -> Iterator[MicroBatch]:
        for batch in micro_batches(8, 8):
            read.append(batch)
            yield batch

    pairs = weighted(batches(), False, fake_groups())
    assert next(pairs)[1] == {} and len(read) == 1
