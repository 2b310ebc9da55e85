"""The borrowed weight between two stages that share this process; tests/engine/test_pipeline.py has real ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Linear, Module

from megatron_sgt.model.tied_weight import TiedWeight
from tests.helpers.fake_groups import fake_groups


class Wire:
    """What a broadcast sends, when both ends call one after the other, the sender first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: Tensor | None = None
        self.sources: list[int] = []
        monkeypatch.setattr(dist, "broadcast", self.broadcast)
        monkeypatch.setattr("megatron.core.parallel_state.get_embedding_group", lambda **_: "ends")

    def broadcast(self, tensor: Tensor, source: int, group: Any) -> None:
        assert group == "ends"
        if self.sent is None:
            self.sent = tensor.clone()
            self.sources.append(source)
            return
        assert self.sent.dtype == tensor.dtype
        tensor.copy_(self.sent)
        self.sent = None


def ends(dtype: torch.dtype) -> tuple[Any, Any, TiedWeight, TiedWeight, TiedWeight]:
    """The first and the last chunk of three stages, on the second of two data-parallel ranks, and all weights."""
    first = SimpleNamespace(embedding=SimpleNamespace(word_embeddings=Linear(2, 3, bias=False, dtype=dtype)))
    last: Any = SimpleNamespace(output_layer=Linear(2, 3, bias=False, dtype=dtype))
    assert isinstance(last.output_layer, Module)
    made = [
        TiedWeight(chunks, fake_groups(dp_rank=1, dp_size=2, pp_rank=stage, pp_size=3))
        for stage, chunks in enumerate(([first], [SimpleNamespace()], [last]))
    ]
    return first, last, made[0], made[1], made[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(monkeypatch)
    first, last, lender, between, borrower = ends(dtype)
    weight = first.embedding.word_embeddings.weight
    assert list(last.output_layer.parameters()) == [] and last.share_embeddings_and_output_weights
    for tied in (lender, between, borrower):
        tied.lend()
    borrowed = last.shared_embedding_or_output_weight
    assert torch.equal(borrowed(), weight) and borrowed().requires_grad and wire.sent is None
    # bf16 would lose the small gradients next to the large one: they add up in fp32.
    for value in (1.0, 1 / 512, 1 / 512):
        (borrowed().float() * value).sum().backward()
    for tied in (between, borrower):
        tied.give_back()
    own = [0.5, 0.25]
    for last_pass, value in enumerate(own):
        lender.expect_gradient(bool(last_pass))
        (weight.float() * value).sum().backward()
        if not last_pass:
            assert torch.equal(weight.grad, torch.full_like(weight, own[0])) and wire.sent is not None
    expected = torch.full_like(weight, own[0]) + torch.full((3, 2), own[1] + 1 + 1 / 256).to(dtype)
    assert torch.equal(weight.grad, expected) and wire.sent is None
    assert wire.sources == [1, 5]  # global ranks: first and last stage of this data-parallel rank


def test_the_next_step_begins_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(monkeypatch)
    first, last, lender, _, borrower = ends(torch.float32)
    for value in (1.0, 3.0):
        lender.lend()
        borrower.lend()
        assert torch.equal(last.shared_embedding_or_output_weight(), first.embedding.word_embeddings.weight)
        (last.shared_embedding_or_output_weight() * value).sum().backward()
        borrower.give_back()
        assert wire.sent is not None and torch.equal(wire.sent, torch.full((3, 2), value))
        wire.sent = None
        with torch.no_grad():
            first.embedding.word_embeddings.weight.add_(1.0)
