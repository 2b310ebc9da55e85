"""Attention of a shard of the queries equals its definition, forward and all gradients."""

import pytest
import torch

from megatron_sgt.ops.attention import causal_attention_reference
from megatron_sgt.ops.shard_attention import aligned_at_the_last_key, shard_attention

SHAPES = [(8, 8), (8, 24), (5, 15), (1, 7), (16, 17), (64, 256)]


def _inputs(queries: int, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = [(queries, 2, 3, 16), (keys, 2, 3, 16), (keys, 2, 3, 16)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("queries", "keys"), SHAPES)
def test_equals_the_definition(queries: int, keys: int, dtype: torch.dtype, tolerance: float) -> None:
    fast, slow = _inputs(queries, keys, dtype), _inputs(queries, keys, dtype)
    weight = torch.linspace(-1, 1, 16, dtype=dtype)
    for function, tensors in ((shard_attention, fast), (causal_attention_reference, slow)):
        out = function(*tensors)
        (out * weight).square().sum().backward()
    torch.testing.assert_close(
        shard_attention(*fast), causal_attention_reference(*slow), atol=tolerance, rtol=tolerance
    )
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize(("queries", "keys"), SHAPES)
def test_the_way_of_gpus_equals_the_definition(queries: int, keys: int) -> None:
    fast, slow = _inputs(queries, keys, torch.float64), _inputs(queries, keys, torch.float64)
    found = aligned_at_the_last_key(*(t.permute(1, 2, 0, 3) for t in fast)).permute(2, 0, 1, 3)
    wanted = causal_attention_reference(*slow)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    for out in (found, wanted):
        out.square().sum().backward()
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-11, rtol=0)


def test_shards_make_up_the_whole() -> None:
    q, k, v = (t.detach() for t in _inputs(24, 24, torch.float64))
    whole = causal_attention_reference(q, k, v)
    shards = [shard_attention(q[i : i + 8], k[: i + 8], v[: i + 8]) for i in (0, 8, 16)]
    torch.testing.assert_close(torch.cat(shards), whole, atol=1e-12, rtol=0)


def test_large_scores_stay_finite() -> None:
    q, k, v = (t.detach() for t in _inputs(8, 24, torch.float32))
    out = shard_attention(60 * q, 60 * k, v)
    torch.testing.assert_close(out, causal_attention_reference(60 * q, 60 * k, v), atol=1e-3, rtol=1e-3)
    assert out.isfinite().all()
