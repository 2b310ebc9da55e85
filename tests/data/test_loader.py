import time
from itertools import islice

import pytest
import torch
from torch.utils.data import Dataset

from megatron_sgt.data.loader import EvalLoader, TrainLoader, sample_ids
from megatron_sgt.errors import DataError


class Numbered(Dataset[dict[str, torch.Tensor]]):
    """Sample i is [i, i]."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= 1000:
            raise DataError(f"sample {index} is bad")
        return {"tokens": torch.full((2,), index), "loss_mask": torch.ones(2)}


LAYOUTS = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4), (2, 1, 4)]
"""(micro-batch size, micro-batches, data-parallel size): all of them 8 samples a step."""


@pytest.mark.parametrize(("micro", "accumulation", "dp_size"), LAYOUTS)
@pytest.mark.parametrize("consumed", [0, 24, 13])
def test_every_layout_reads_the_same_global_batches(micro: int, accumulation: int, dp_size: int, consumed: int) -> None:
    loaders = [TrainLoader(Numbered(), micro, accumulation, rank, dp_size, consumed) for rank in range(dp_size)]
    for step in range(3):
        ids = []
        for m in range(accumulation):
            for rank, loader in enumerate(loaders):
                assert loader.consumed_samples == consumed + 8 * step
                batch = next(loader)
                assert batch["tokens"].shape == (micro, 2) and batch["loss_mask"].shape == (micro, 2)
                got = batch["tokens"][:, 0].tolist()
                assert got == list(sample_ids(consumed + 8 * step, m, micro, rank, dp_size))
                ids += got
        assert ids == list(range(consumed + 8 * step, consumed + 8 * step + 8))
    assert {loader.consumed_samples for loader in loaders} == {consumed + 24}


def test_resumed_under_another_layout_nothing_is_repeated_or_missed() -> None:
    seen: list[int] = []
    consumed = 0
    for micro, accumulation, dp_size in LAYOUTS:
        loaders = [TrainLoader(Numbered(), micro, accumulation, r, dp_size, consumed) for r in range(dp_size)]
        for _ in range(2):
            for loader in loaders:
                for batch in islice(loader, accumulation):
                    seen += batch["tokens"][:, 0].tolist()
        consumed = loaders[0].consumed_samples
    assert consumed == 8 * 2 * len(LAYOUTS)
    assert sorted(seen) == list(range(consumed))


def test_workers_give_the_same_batches_and_leave_the_random_stream_alone() -> None:
    state = torch.get_rng_state()
    plain = TrainLoader(Numbered(), 2, 3, 1, 2, 12)
    working = TrainLoader(Numbered(), 2, 3, 1, 2, 12, num_workers=2)
    for _ in range(9):
        expected, got = next(plain), next(working)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected)
        assert plain.consumed_samples == working.consumed_samples
    assert torch.equal(torch.get_rng_state(), state)
    start = time.monotonic()
    del working
    assert time.monotonic() - start < 4, "the workers end at once; 5 s is the time-out for one that does not"


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_pinned_memory_gives_the_same_batches() -> None:
    plain = TrainLoader(Numbered(), 2, 3, 0, 2, 5)
    pinned = TrainLoader(Numbered(), 2, 3, 0, 2, 5, pin_memory=True)
    for _ in range(4):
        assert torch.equal(next(plain)["tokens"], next(pinned)["tokens"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_sample_is_one_line(num_workers: int) -> None:
    loader = TrainLoader(Numbered(), 2, 1, 0, 1, consumed_samples=996, num_workers=num_workers)
    next(loader)
    next(loader)
    with pytest.raises(DataError) as error:
        next(loader)
    assert str(error.value) == "sample 1000 is bad"


def test_evaluation_reads_the_same_samples_every_time() -> None:
    loaders = [EvalLoader(Numbered(), 2, 2, rank, 2, num_steps=3) for rank in range(2)]
    assert len(loaders[0]) == 6
    for _ in range(2):
        ids = [i for loader in loaders for batch in loader for i in batch["tokens"][:, 0].tolist()]
        assert sorted(ids) == list(range(24))


@pytest.mark.parametrize("pin_memory", [False, True])
def test_a_set_that_ends_within_a_step_counts_every_sample_once(pin_memory: bool) -> None:
    """Every rank has as many micro-batches as the others."""
    loaders = [EvalLoader(Numbered(), 2, 2, rank, 2, 2, pin_memory, num_samples=11) for rank in range(2)]
    batches = [batch for loader in loaders for batch in loader]
    assert len(batches) == 2 * len(loaders[0]) == 8
    counted = [
        int(row[0]) for b in batches for row, mask in zip(b["tokens"], b["loss_mask"], strict=True) if mask.any()
    ]
    assert sorted(counted) == list(range(11))


@pytest.mark.parametrize("arguments", [(0, 1, 0, 1), (1, 0, 0, 1), (1, 1, 1, 1), (1, 1, -1, 1), (1, 1, 0, 1, -1)])
def test_impossible_layouts(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        TrainLoader(Numbered(), *arguments)  # type: ignore[arg-type]
