"""SwiGLU: the definition by hand, and the same bits with less in memory."""

import math

import pytest
import torch
from torch import Tensor

from megatron_sgt.ops.swiglu import swiglu, swiglu_reference
from tests.helpers.loop_problems import random

SHAPE = (5, 2, 16)


def test_by_hand() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    wanted = [1.0 / (1 + math.exp(-1.0)) * 3.0, -2.0 / (1 + math.exp(2.0)) * 0.5]
    torch.testing.assert_close(swiglu_reference(x), torch.tensor([wanted]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_equals_the_definition_bit_for_bit(contiguous: bool, dtype: torch.dtype) -> None:
    def leaf() -> Tensor:
        x = random(*SHAPE, seed=1, dtype=dtype).detach()
        return (x if contiguous else x.transpose(0, 1)).requires_grad_()

    pull = random(*leaf().shape[:2], SHAPE[-1] // 2, seed=2, dtype=dtype)
    found, wanted = leaf(), leaf()
    for function, x in ((swiglu, found), (swiglu_reference, wanted)):
        out = function(x)
        assert out.dtype == dtype
        out.backward(pull)
    assert torch.equal(swiglu(found), swiglu_reference(wanted))
    assert found.grad is not None and wanted.grad is not None
    assert torch.equal(found.grad, wanted.grad)


def test_backward_keeps_the_input_alone() -> None:
    x = random(*SHAPE, seed=1).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(x)
    assert kept == [x.data_ptr()]
