"""Samples cut into shorter sequences: no token is lost, repeated or seen from another piece."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from megatron_sgt.config.lengths import SequenceLengths
from megatron_sgt.data.loader import TrainLoader
from megatron_sgt.data.pieces import cut

LENGTH = 24
CURRICULUM = SequenceLengths(LENGTH, ends=(2, 3), shorter=(6, 12))
STEPS = 5


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Sample i: LENGTH + 1 tokens that no other sample has but for the neighbours' one, a mask with holes."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(LENGTH * index, LENGTH * (index + 1) + 1)
        mask = (tokens[:-1] % 5 != 0).float()
        return {
            "tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": mask, "position_ids": torch.arange(LENGTH),
        }  # fmt: skip


def pairs(tokens: list[int], labels: list[int], mask: list[float]) -> list[Any]:
    """(context, target, weight) of each position of a sequence."""
    return [(tuple(tokens[: n + 1]), labels[n], mask[n]) for n in range(len(tokens))]


def trained(dp_size: int, micro: int) -> tuple[Counter[Any], int]:
    """Of a run under the curriculum over all ranks; and the samples that it has consumed."""
    found: Counter[Any] = Counter()
    loaders = [TrainLoader(Windows(), micro, 4 // (micro * dp_size), rank, dp_size) for rank in range(dp_size)]
    for step in range(1, STEPS + 1):
        for loader in loaders:
            for _ in range(loader.num_micro_batches):
                batch = cut(next(loader), CURRICULUM.pieces_at(step))
                for row in range(len(batch["tokens"])):
                    found.update(pairs(*(batch[name][row].tolist() for name in ("tokens", "labels", "loss_mask"))))
    return found, loaders[0].consumed_samples


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 4), (2, 1), (2, 2)])
def test_contexts_and_targets_are_those_of_the_samples_up_to_the_borders(dp_size: int, micro: int) -> None:
    expected: Counter[Any] = Counter()
    for index in range(4 * STEPS):
        length = (6, 6, 12, 24, 24)[index // 4]
        whole = {name: tensor.tolist() for name, tensor in Windows()[index].items()}
        for begin in range(0, LENGTH, length):
            expected.update(pairs(*(whole[n][begin : begin + length] for n in ("tokens", "labels", "loss_mask"))))
    found, consumed = trained(dp_size, micro)
    assert found == expected and len(found) == found.total() == 4 * STEPS * LENGTH
    assert consumed == 4 * STEPS, "samples are counted whole"


def test_pieces_keep_their_order_and_begin_at_position_0() -> None:
    batch = {name: torch.stack([Windows()[3][name], Windows()[4][name]]) for name in Windows()[0]}
    pieces = cut(batch, 4)
    assert {name: tuple(tensor.shape) for name, tensor in pieces.items()} == dict.fromkeys(batch, (8, 6))
    assert torch.equal(pieces["tokens"].flatten(), batch["tokens"].flatten())
    assert pieces["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]] * 8 and pieces["position_ids"].dtype == torch.int64
    assert pieces["tokens"].data_ptr() == batch["tokens"].data_ptr(), "nothing is copied"


def test_stages_of_a_pipeline_cut_what_they_need() -> None:
    """The last one labels alone, one in the middle nothing."""
    labels = Windows()[0]["labels"][None]
    assert torch.equal(cut({"labels": labels}, 4)["labels"], labels.view(4, 6))
    assert cut({}, 4) == {}


def test_one_piece_is_the_sample_itself() -> None:
    batch = {name: tensor[None] for name, tensor in Windows()[0].items()}
    assert cut(batch, 1) is batch
