import pytest
import torch
from megatron.core import parallel_state

from megatron_sgt.engine.build import start_processes
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.ops.norm import rms_norm, rms_norm_reference, sharded_rms_norm
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import small_config

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1, 7), (5, 3, 64), (2, 3, 4, 33)], ids=str)
def test_output_and_gradients_equal_the_definition(shape: tuple[int, ...], dtype: torch.dtype, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (0.1 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    weight = (1.0 + 0.3 * torch.randn(shape[-1], generator=generator)).to(dtype).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    out, wanted = rms_norm(x, weight, eps), rms_norm_reference(exact[0], exact[1], eps)
    assert out.dtype == dtype and out.shape == shape
    assert rms_norm_reference(x, weight, eps).dtype == dtype
    torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    pull = torch.randn(shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((out.double() * pull).sum(), (x, weight))
    for grad, wanted_grad in zip(grads, torch.autograd.grad((wanted * pull).sum(), exact), strict=True):
        torch.testing.assert_close(grad.double(), wanted_grad, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def test_the_definition_by_hand() -> None:
    """Mean square 12.5, plus eps 0.5: divide by sqrt(13)."""
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0])
    wanted = torch.tensor([[3.0, 8.0]]) / 13**0.5
    for norm in (rms_norm, rms_norm_reference):
        torch.testing.assert_close(norm(x, weight, 0.5), wanted)


def test_a_row_of_zeros_stays_zero() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = rms_norm(x, torch.ones(8), 1e-6)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 8))
    assert x.grad is not None and bool(x.grad.isfinite().all())


def shares(info: RankInfo, dtype: torch.dtype) -> float:
    """How far this rank's share of output and gradients is from that of the definition, over two ranks' shares."""
    config = small_config(parallel={"device": "cpu", "tensor_model_parallel_size": info.world_size})
    start_processes(config, info)
    generator = torch.Generator().manual_seed(0)
    x, pull = (torch.randn(5, 2, 24, generator=generator, dtype=torch.float64) for _ in "ab")
    weight = 1.0 + 0.3 * torch.randn(24, generator=generator, dtype=torch.float64)
    mine = slice(info.rank * 12, info.rank * 12 + 12)
    whole = [t.clone().requires_grad_() for t in (x, weight)]
    own = [t[..., mine].to(dtype).requires_grad_() for t in (x, weight)]
    wanted = rms_norm_reference(*whole, 1e-2)
    found = sharded_rms_norm(*own, 1e-2, parallel_state.get_tensor_model_parallel_group())
    assert found.dtype == dtype
    (wanted * pull).sum().backward()
    (found.double() * pull[..., mine]).sum().backward()
    pairs = [(found, wanted), *((a.grad, b.grad) for a, b in zip(own, whole, strict=True))]
    return max(float((a.double() - b[..., mine]).abs().max()) for a, b in pairs)  # type: ignore[union-attr, index]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 0.1)], ids=str)
def test_a_norm_over_the_shares_of_two_ranks(dtype: torch.dtype, tolerance: float) -> None:
    assert max(run_on_ranks(2, shares, dtype)) <= tolerance
