"""A gradient that is not finite reaches the norm from every tensor-parallel rank, and nothing else changes.

tests/engine/test_step.py has the same through engines, ZeRO-3's among them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from megatron_sgt.compat.deepspeed_finite import notice_every_copy

COUNTED = torch.tensor([3.0, 4.0])


def optimizer_with(*vectors: torch.Tensor) -> Any:
    """A BF16_Optimizer whose norm looks at COUNTED, of gradients that are ``vectors`` in all."""
    optimizer: Any = object.__new__(BF16_Optimizer)
    optimizer.get_grads_for_norm = lambda for_clipping=False: [COUNTED] if for_clipping else ([COUNTED], {})
    optimizer.fp32_groups_actual_gradients_flat = list(vectors)
    return optimizer


@pytest.mark.parametrize("tp_rank", [0, 1])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_every_copy_reaches_the_norm(tp_rank: int, bad: float | None) -> None:
    one, other = torch.randn(7), torch.randn(5)
    if bad is not None:
        other[3] = bad
    optimizer = optimizer_with(one, other)
    notice_every_copy(optimizer, 2, tp_rank)
    gradients, experts = optimizer.get_grads_for_norm()
    norm = float(torch.stack([g.norm() for g in gradients]).norm())
    assert experts == {} and optimizer.get_grads_for_norm(for_clipping=True) == [COUNTED]
    if bad is None or tp_rank == 0:  # rank 0 counts every gradient itself
        assert norm == 5.0
    else:
        assert math.isnan(norm)


def test_loading_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    notice_every_copy(optimizer_with(), 1, 0)
    bf16_optimizer.print("_load_legacy_checkpoint")  # type: ignore[attr-defined]
    print("others do")
    assert capsys.readouterr().out == "others do\n"


def test_other_optimizers_are_left_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    before = dict(vars(optimizer := torch.optim.AdamW([weight])))
    notice_every_copy(optimizer, 2, 1)
    assert vars(optimizer) == before
