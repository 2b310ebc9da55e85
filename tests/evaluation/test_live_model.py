"""How requests become forward passes: blocks, lengths, shares of data-parallel ranks, where a continuation ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgt.errors import DataError
from megatron_sgt.evaluation import live_model as module
from megatron_sgt.evaluation.live_model import LiveModel
from tests.helpers.fake_groups import fake_groups

END = 9


class Counting:
    """A model that holds the next number, modulo 10, for the likeliest: ln 1/2; anything else ln 1/4."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_length: int = 40, **place: int) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.alive = 0
        monkeypatch.setattr(module, "token_scores", self._scores)
        groups = fake_groups(**place)
        decode = lambda ids: " ".join(map(str, ids))  # noqa: E731
        self.live = LiveModel(None, groups, 2, 10, max_length, decode, END, self._is_alive)

    def _is_alive(self) -> None:
        self.alive += 1

    def _scores(self, _: Any, tokens: Tensor, targets: Tensor, *__: Any) -> tuple[Tensor, Tensor]:
        self.shapes.append(tuple(tokens.shape))
        best = (tokens + 1) % 10
        return torch.where(best == targets, 0.5, 0.25).log(), best


def test_what_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(monkeypatch)
    rows = [([1, 2, 3], 2), ([1, 2, 4], 2), ([7, 7, 7, 8, 9, 0], 3), ([5, *range(6)] * 3, 1), (list(range(10)) * 3, 29)]
    found = counting.live.score(rows)
    ln2 = torch.tensor(2.0).log().item()
    assert [same for _, same in found] == [True, False, True, True, True]
    assert [chance / -ln2 for chance, _ in found] == pytest.approx([2, 3, 3, 1, 29])
    assert counting.shapes == [(2, 32), (2, 16), (1, 16)], "the longest first, lengths in sixteens"
    assert counting.alive == 3


def test_a_length_is_never_above_what_the_model_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(monkeypatch, max_length=20)
    counting.live.score([(list(range(10)) * 2, 1), ([1] * 21, 3)])
    assert counting.shapes == [(2, 20)]


def test_where_a_continuation_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    live = Counting(monkeypatch).live
    assert live.continuations([[1], [0, 6], [2, 3, 4]], 4, []) == [[2, 3, 4, 5], [7, 8, END], [5, 6, 7, 8]]
    assert live.continuations([[1], [0, 6]], 4, ["3", ""]) == [[2, 3], [7, 8, END]]


def test_ranks_share_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five sequences are three blocks, two turns: the second rank has nothing in the second, and repeats the first."""
    rows = [(list(range(n)), 1) for n in (9, 8, 7, 6, 5)]
    shares: dict[int, Any] = {}
    monkeypatch.setattr(module, "on_rank_zero", lambda work: work())
    for rank in (1, 0):

        def gather(into: list[Any], own: Any, group: Any, rank: int = rank) -> None:
            shares[rank] = own
            into[:] = [own, shares.get(1, own)]

        monkeypatch.setattr(dist, "all_gather_object", gather)
        counting = Counting(monkeypatch, dp_rank=rank, dp_size=2)
        if rank == 0:
            assert len(counting.live.score(rows)) == 5
        else:
            with pytest.raises(KeyError):  # the first rank's share is not there yet
                counting.live.score(rows)
        assert len(counting.shapes) == 2
    assert sorted(shares[0]) == [0, 1, 4] and sorted(shares[1]) == [0, 1, 2, 3]


def test_a_failure_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    live = Counting(monkeypatch).live
    assert live.together(lambda: 3) == 3

    def fail() -> int:
        raise DataError("no data")

    with pytest.raises(DataError, match="no data"):
        live.together(fail)
    with pytest.raises(DataError, match="KeyError: 'rouge'"):
        live.together(lambda: {}["rouge"])


def test_what_a_forward_pass_raises_is_told_to_no_rank_as_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are inside it: an error of which the harness makes another one ends this process all the same."""
    counting, told = Counting(monkeypatch), []
    monkeypatch.setattr(module, "on_rank_zero", lambda work: told.append(work()) or told[-1])

    def broken(*_: Any) -> None:
        raise ValueError("cuBLAS")

    monkeypatch.setattr(module, "token_scores", broken)

    def work() -> None:
        try:
            counting.live.score([([1, 2], 1)])
        except ValueError as error:
            raise DataError("the data of x cannot be read") from error

    with pytest.raises(ValueError, match="cuBLAS"):
        counting.live.together(work)
    assert len(told) == 1, "the question alone"
