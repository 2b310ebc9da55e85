"""The rules inside the section of the optimizer."""

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_sgt.config import OptimConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0}, "lr"),
        ({"min_lr": 2e-3}, "min_lr: 0.002 is above lr 0.001"),
        ({"lr_decay_style": "WSD"}, "lr_wsd_decay_iters: is required with lr_decay_style 'WSD'"),
        ({"lr_wsd_decay_iters": 5}, "lr_wsd_decay_iters: 5 has no effect with lr_decay_style 'cosine'"),
        ({"adam_beta2": 1}, "adam_beta2"),
        ({"clip_grad": -1}, "clip_grad"),
    ],
)
def test_rules(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OptimConfig(**{"lr": 1e-3, **given})


def test_edges() -> None:
    optim = OptimConfig(lr=1e-3, min_lr=1e-3, clip_grad=0, lr_decay_style="WSD", lr_wsd_decay_iters=5)
    assert (optim.min_lr, optim.clip_grad) == (optim.lr, 0)
