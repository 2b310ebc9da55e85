"""What is not finite makes the gradient NaN, and nothing else changes it."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.engine.finite import guard
from megatron_sgt.model.entropy_meter import EntropyMeter


@pytest.mark.parametrize("loss", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("entropy", [0.5, math.nan])
def test_the_gradient_of_a_loss(loss: float, entropy: float) -> None:
    meter = EntropyMeter(1, 1, HeadLayout(2, 2, 2, 1, 0), torch.device("cpu"))
    meter.store(0, 0, torch.tensor([0.1, entropy]))
    x = torch.tensor(2.0, requires_grad=True)
    output = x * 3 + (loss - 1.0)
    guard(output, meter)
    meter.end_micro_batch()  # the decision belongs to the forward pass
    output.backward()
    spoiled = not math.isfinite(loss) or not math.isfinite(entropy)
    assert math.isnan(x.grad) if spoiled else float(x.grad) == 3.0


def test_what_a_chunk_hands_on_is_judged_by_its_entropies() -> None:
    """Values that are not finite reach the loss; the whole output is never read."""
    for entropy in (0.5, math.inf):
        meter = EntropyMeter(1, 1, HeadLayout(2, 2, 2, 1, 0), torch.device("cpu"))
        meter.store(0, 0, torch.tensor([0.1, entropy]))
        x = torch.ones(2, 3, requires_grad=True)
        output = x * 2
        guard(output, meter)
        output.backward(torch.full_like(output, 0.25))
        assert torch.equal(x.grad, torch.full_like(x, 0.5)) == math.isfinite(entropy)
        assert bool(x.grad.isnan().all()) == (not math.isfinite(entropy))
