"""The scores of next tokens against the whole logits; ``tests/engine/test_live_tasks.py`` has the layouts."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgt.evaluation import token_scores as module
from megatron_sgt.evaluation.token_scores import token_scores
from tests.helpers.fake_groups import fake_groups
from tests.helpers.single import random_batch, single_groups, single_model, small_config


class Engine:
    """Calls its module."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, **inputs: Any) -> Tensor:
        return self.module(**inputs)


class Share:
    """Answers with one rank's logits."""

    module = SimpleNamespace(pipeline=None, chunks=(None,))

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, **inputs: Any) -> Tensor:
        return self.logits


def test_against_the_logits() -> None:
    """The vocabulary ends at 120: the rows behind it are padding, and no text has them."""
    config = small_config()
    model = single_model(config).eval()
    batch = random_batch(config)
    logits = model.logits(batch["tokens"])[..., :120].float()
    targets = batch["labels"] % 120
    chances, best = token_scores(Engine(model), batch["tokens"], targets, 120, single_groups(config))
    expected = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert torch.allclose(chances, expected, atol=1e-6)
    assert torch.equal(best, logits.argmax(-1))


class Two:
    """all_reduce of two ranks that are threads."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=20)
        self._given: dict[int, Tensor] = {}

    def all_reduce(self, value: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        rank = int(threading.current_thread().name)
        self._given[rank] = value.clone()
        self._barrier.wait()
        both = torch.stack([self._given[0], self._given[1]])
        reduced = {dist.ReduceOp.MAX: both.amax(0), dist.ReduceOp.MIN: both.amin(0)}.get(op, both.sum(0))
        value.copy_(reduced)
        self._barrier.wait()


@pytest.mark.parametrize("vocab_size", [12, 6])
def test_a_vocabulary_in_two_parts(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal highest logits: the lowest id is the likeliest. With 6 ids the second rank has padding alone."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 16, generator=generator)
    logits[0, 0, [3, 9]] = 9.0
    targets = torch.randint(vocab_size, (2, 5), generator=generator)
    monkeypatch.setattr(module, "inputs_of", lambda *_: {})
    monkeypatch.setattr(module, "begin_step", lambda _: None)
    monkeypatch.setattr(dist, "all_reduce", Two().all_reduce)
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def ask(rank: int) -> None:
        engine: Any = Share(logits[..., 8 * rank : 8 * rank + 8])
        found[rank] = token_scores(engine, targets, targets, vocab_size, fake_groups(tp_rank=rank, tp_size=2))

    threads = [threading.Thread(target=ask, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    real = logits[..., :vocab_size]
    expected = real.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    for rank in range(2):
        assert torch.allclose(found[rank][0], expected, atol=1e-6)
        assert torch.equal(found[rank][1], real.argmax(-1)) and found[rank][1][0, 0] == 3
