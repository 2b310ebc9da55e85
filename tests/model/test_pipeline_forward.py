"""Which inputs a chunk gets, and how many micro-batches pass; tests/engine/test_pipeline.py runs real pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sgt.config.pipeline import PipelineLayout
from megatron_sgt.model import pipeline_forward
from megatron_sgt.model.pipeline_forward import forward_only, from_last_stage, inputs_of
from megatron_sgt.model.pipeline_stage import Pipeline
from tests.helpers.fake_groups import fake_groups
from tests.helpers.single import random_batch, small_config

CPU = torch.device("cpu")
FIRST, LAST = ["tokens", "position_ids"], ["labels", "loss_mask"]


def chunk(first: bool = False, last: bool = False) -> Any:
    return SimpleNamespace(pre_process=first, post_process=last)


@pytest.mark.parametrize(
    ("first", "last", "names"),
    [(True, False, FIRST), (False, False, []), (False, True, LAST), (True, True, FIRST + LAST)],
)
def test_a_chunk_gets_what_it_needs(first: bool, last: bool, names: list[str]) -> None:
    batch = random_batch(small_config())
    found = inputs_of(chunk(first, last), batch, CPU)
    assert sorted(found) == sorted(names)
    assert all(torch.equal(tensor, batch[name]) for name, tensor in found.items())
    del batch["labels"], batch["loss_mask"]  # for logits
    assert sorted(inputs_of(chunk(first, last), batch, CPU)) == sorted(set(names) - set(LAST))


@pytest.mark.parametrize(("counts", "passed"), [((2, 2), 3), ((1, 1, 1, 1), 4)])
def test_interleaved_the_batches_are_filled_up(counts: tuple[int, ...], passed: int, monkeypatch: Any) -> None:
    sent: list[Any] = []

    def schedule(chunks: Any, forward: Any, batches: Any, shape: tuple[int, int], device: torch.device) -> None:
        assert shape == (2, 32) and device == CPU and not torch.is_grad_enabled()
        sent.extend(batches)
        for batch in batches:
            forward(len(chunks) - 1, batch)

    monkeypatch.setattr(pipeline_forward, "run_schedule", schedule)
    layout = PipelineLayout(2, counts)
    chunks: Any = tuple(chunk(last=n == layout.virtual_size - 1) for n in range(layout.virtual_size))
    batches = [random_batch(small_config(), seed) for seed in range(3)]
    pipeline = Pipeline(layout, fake_groups(pp_rank=1, pp_size=2), chunks, None)
    found = forward_only(pipeline, lambda number, inputs: inputs["labels"].sum(), batches)
    assert len(sent) == passed and sent[:3] == batches
    assert [int(one) for one in found] == [int(batch["labels"].sum()) for batch in batches]


def test_an_evaluation_passes_in_blocks(monkeypatch: Any) -> None:
    """No more batches than a block's are read ahead, and a tied weight is lent once."""
    read: list[int] = []
    sent: list[tuple[int, int]] = []
    lent: list[None] = []

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for number in range(19):
            read.append(number)
            yield {"tokens": torch.zeros(2, 8), "labels": torch.tensor(number)}

    def schedule(chunks: Any, forward: Any, batches: Any, *_: Any) -> None:
        sent.append((len(batches), len(read)))
        for batch in batches:
            forward(1, batch)

    monkeypatch.setattr(pipeline_forward, "run_schedule", schedule)
    chunks: Any = (chunk(), chunk(last=True))
    tied: Any = SimpleNamespace(lend=lambda: lent.append(None))
    pipeline = Pipeline(PipelineLayout(2, (1, 1, 1, 1)), fake_groups(pp_rank=1, pp_size=2), chunks, tied)
    found = forward_only(pipeline, lambda number, inputs: inputs["labels"], batches())
    assert sent == [(16, 16), (4, 19)] and len(lent) == 1
    assert [int(one) for one in found] == list(range(19))


def test_without_a_pipeline_nothing_is_sent() -> None:
    value = torch.tensor(2.0)
    assert from_last_stage(value, fake_groups()) is value
