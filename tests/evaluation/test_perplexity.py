import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgt.evaluation.perplexity import bits_per_byte, mean_loss, perplexity
from tests.helpers.fake_groups import fake_groups
from tests.helpers.single import random_batch, single_groups, single_model, small_config


class Model(torch.nn.Module):
    """Its loss is the mean of the tokens; it notes in which state it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.states: list[tuple[bool, bool]] = []

    def inputs(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        return batch

    def forward(self, tokens: Tensor) -> Tensor:
        self.states.append((self.training, torch.is_grad_enabled()))
        return (self.weight * tokens).mean().bfloat16()


def batches(*values: float) -> list[dict[str, Tensor]]:
    return [{"tokens": torch.full((2, 4), value)} for value in values]


@pytest.mark.parametrize("training", [True, False])
def test_mean_over_micro_batches(training: bool) -> None:
    model = Model().train(training)
    assert mean_loss(model, batches(1.0, 2.0, 6.0), fake_groups()) == 3.0
    assert model.states == [(False, False)] * 3
    assert model.training is training


def test_without_batches() -> None:
    model = Model()
    assert math.isnan(mean_loss(model, [], fake_groups()))
    assert model.training


def test_the_mean_is_taken_in_fp32() -> None:
    """bf16 cannot hold 256 + 1; each loss is rounded, their mean is not."""
    assert mean_loss(Model(), batches(256.0, 258.0), fake_groups()) == 257.0


def test_mean_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(value: Tensor, group: Any = None, op: Any = None) -> None:
        value += 5.0 if op is None else 0  # what the other rank found; it has no masks

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert mean_loss(Model(), batches(1.0, 2.0), fake_groups(dp_size=2)) == 3.25


def test_every_token_counts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked tokens are no tokens; another rank has a loss of 4 over 8 more of them."""
    config = small_config()
    model, groups = single_model(config), single_groups(config)
    some = [random_batch(config, seed) for seed in range(3)]
    some[1]["loss_mask"][:, 3:] = 0.0
    some[2]["loss_mask"][:] = 0.0
    losses, tokens = [], []
    for batch in some[:2]:
        losses.append(mean_loss(model, [batch], groups))
        tokens.append(int(batch["loss_mask"].sum()))
    assert tokens[0] != tokens[1] and abs(losses[0] - losses[1]) > 1e-3
    mean = sum(map(math.prod, zip(losses, tokens, strict=True))) / sum(tokens)
    assert mean_loss(model, some, groups) == pytest.approx(mean, rel=1e-6)

    def all_reduce(value: Tensor, group: Any = None, op: Any = None) -> None:
        value += torch.tensor([32.0, 8.0]) if op is None else 0

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    both = (mean * sum(tokens) + 32) / (sum(tokens) + 8)
    assert mean_loss(model, some, fake_groups(dp_size=2)) == pytest.approx(both, rel=1e-6)


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(2) * 3, 10, 15) == pytest.approx(2.0)
    assert bits_per_byte(1.0, 10, None) is bits_per_byte(1.0, 10, 0) is None


def test_a_real_model_twice_and_with_dropout() -> None:
    """Validation draws nothing and leaves nothing behind."""
    config = small_config(model={"attention_dropout": 0.3, "hidden_dropout": 0.3})
    model, groups = single_model(config).train(), single_groups(config)
    model.meter.enabled = True
    state = torch.get_rng_state()
    some = [random_batch(config, seed) for seed in range(2)]
    first = mean_loss(model, some, groups)
    assert first == mean_loss(model, some, groups)
    assert first == pytest.approx(math.log(128), abs=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    model.meter.end_micro_batch()
    assert not model.meter.reduce(groups).any()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("loss", "wanted"), [(0.0, 1.0), (math.log(128), 128.0), (1e4, math.inf), (math.inf, math.inf)]
)
def test_perplexity(loss: float, wanted: float) -> None:
    assert perplexity(loss) == pytest.approx(wanted)


def test_perplexity_of_nothing_is_nothing() -> None:
    assert math.isnan(perplexity(math.nan))
