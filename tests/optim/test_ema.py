"""The average alone: its arithmetic, and that an exchange moves values and nothing else."""

from __future__ import annotations

import pytest
import torch

from megatron_sgt.optim import ema
from megatron_sgt.optim.ema import WeightAverage

DECAY = 0.9


def random_weights(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in ((7,), (3, 5), (0,))]


def test_it_starts_from_the_weights_and_follows_them() -> None:
    weights = random_weights()
    average = WeightAverage(weights, DECAY)
    expected = [w.detach().double() for w in weights]
    for step in range(1, 50):
        for weight, new in zip(weights, random_weights(step), strict=True):
            weight.data.copy_(new)
        average.update()
        expected = [DECAY * a + (1 - DECAY) * w.detach().double() for a, w in zip(expected, weights, strict=True)]
    for found, wanted in zip(average.tensors, expected, strict=True):
        assert torch.allclose(found.double(), wanted, atol=1e-6, rtol=0)
        assert found.dtype == torch.float32 and not found.requires_grad
    average.start()
    assert all(torch.equal(a, w) for a, w in zip(average.tensors, weights, strict=True))


def test_an_exchange_moves_values_and_two_move_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that do not divide the tensors; whoever holds views of the weights sees the average."""
    monkeypatch.setattr(ema, "_CHUNK", 4)
    weights = random_weights()
    average = WeightAverage(weights, DECAY)
    for weight, new in zip(weights, random_weights(1), strict=True):
        weight.data.copy_(new)
    view, places = weights[1].detach()[1], [tensor.data_ptr() for tensor in (*weights, *average.tensors)]
    before, kept = [w.detach().clone() for w in weights], [a.clone() for a in average.tensors]
    average.exchange()
    assert all(torch.equal(w, a) for w, a in zip(weights, kept, strict=True))
    assert all(torch.equal(a, w) for a, w in zip(average.tensors, before, strict=True))
    assert torch.equal(view, kept[1][1]) and not torch.equal(before[0], kept[0])
    average.exchange()
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert all(torch.equal(a, k) for a, k in zip(average.tensors, kept, strict=True))
    assert places == [tensor.data_ptr() for tensor in (*weights, *average.tensors)]


def test_what_is_saved_is_what_is_loaded() -> None:
    average, other = WeightAverage(random_weights(), DECAY), WeightAverage(random_weights(1), DECAY)
    other.load_state_dict(average.state_dict())
    assert all(torch.equal(a, o) for a, o in zip(average.tensors, other.tensors, strict=True))
    assert other.tensors[0] is not average.tensors[0] and average.num_bytes == 4 * (7 + 15)


@pytest.mark.parametrize("saved", [{}, {"average": []}, {"average": [torch.zeros(6), torch.zeros(15), torch.zeros(0)]}])
def test_another_average_is_refused(saved: dict[str, list[torch.Tensor]]) -> None:
    with pytest.raises((KeyError, ValueError, RuntimeError)):
        WeightAverage(random_weights(), DECAY).load_state_dict(saved)
