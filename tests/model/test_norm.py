"""The norms' values, and whose gradients are summed over tensor-parallel ranks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sgt.model import norm as norm_module
from megatron_sgt.model.norm import NORMS, HeadNorm, LayerNorm, RMSNorm
from megatron_sgt.ops.norm import rms_norm_reference


def settings(dtype: torch.dtype = torch.float32, tp: int = 1, sequence_parallel: bool = False) -> Any:
    return SimpleNamespace(params_dtype=dtype, tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)


def uneven(norm: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


@pytest.mark.parametrize("kind", [RMSNorm, HeadNorm])
def test_rms_norms(kind: type[RMSNorm]) -> None:
    norm = kind(settings(), 24, 1e-5)
    uneven(norm)
    x = torch.randn(5, 2, 24)
    assert norm.eps == 1e-5 and set(dict(norm.named_parameters())) == {"weight"}
    torch.testing.assert_close(norm(x), rms_norm_reference(x, norm.weight, 1e-5))


def test_layer_norm() -> None:
    norm = LayerNorm(settings(), 24, 1e-2)
    uneven(norm)
    x = torch.randn(5, 2, 24)
    centred = x - x.mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + 1e-2).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), wanted)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (24,), norm.weight, norm.bias, 1e-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm, HeadNorm])
def test_a_new_norm_is_neutral_and_of_the_models_type(kind: type[Any], dtype: torch.dtype) -> None:
    norm = kind(settings(dtype), 8, 1e-6, unknown_to_it=True)
    assert {p.dtype for p in norm.parameters()} == {dtype}
    assert torch.equal(norm.weight.detach(), torch.ones(8, dtype=dtype))
    if kind is LayerNorm:
        assert torch.equal(norm.bias.detach(), torch.zeros(8, dtype=dtype))
    assert norm(torch.randn(3, 8, dtype=dtype)).dtype == dtype


def test_names_of_the_configuration() -> None:
    assert sorted(NORMS) == ["LayerNorm", "RMSNorm"]
    assert NORMS["RMSNorm"] is RMSNorm and NORMS["LayerNorm"] is LayerNorm


@pytest.mark.parametrize(
    ("kind", "tp", "sequence_parallel", "summed"),
    [
        (RMSNorm, 1, False, False),
        (RMSNorm, 2, False, False),  # every rank has the whole gradient
        (RMSNorm, 2, True, True),
        (LayerNorm, 2, False, False),
        (LayerNorm, 2, True, True),
        (HeadNorm, 1, False, False),
        (HeadNorm, 2, False, True),  # every rank has only its own heads' part
        (HeadNorm, 2, True, True),
    ],
)
def test_gradients_that_are_parts_are_summed(
    kind: type[Any], tp: int, sequence_parallel: bool, summed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Doubling the gradient stands for the sum over two ranks."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    monkeypatch.setattr(norm_module, "copy_to_tensor_model_parallel_region", Doubled.apply)
    norm = kind(settings(tp=tp, sequence_parallel=sequence_parallel), 8, 1e-6)
    alone = kind(settings(), 8, 1e-6)
    x = torch.randn(3, 2, 8)
    for one in (norm, alone):
        (one(x) ** 2).sum().backward()
    factor = 2 if summed else 1
    for part, whole in zip(norm.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(part.grad, factor * whole.grad)
