"""Attention by documents: the definition with its mask, documents alone, nothing across, few calls."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from megatron_sgt.ops.attention import causal_attention, causal_attention_reference
from megatron_sgt.ops.document_attention import by_document
from megatron_sgt.ops.documents import Documents
from megatron_sgt.ops.shard_attention import shard_attention
from tests.helpers.documents import documents_of, starts_of
from tests.helpers.tensor_shapes import ShapeRecorder

Attention = Callable[..., Tensor]
LENGTHS = ((1, 9, 1, 13), (8, 8, 1, 7))
"""One-token documents, equal ones, and at the end of the second sequence padding, a document of its own."""
DOCUMENTS = documents_of(*LENGTHS, padding=(0, 7))
HEADS, SIZE = 4, 8
# The last of the positions; the ranks of a balanced loop: a document begins before the queries, or with them.
SHARES = [(24, 24), (8, 24), (12, 12), (8, 16), (1, 24), (3, 12)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def inputs(queries: int, keys: int, groups: int = HEADS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + 100 * keys)
    shapes = [(queries, 2, HEADS, SIZE), (keys, 2, groups, SIZE), (keys, 2, groups, SIZE)]
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [t.to(dtype).requires_grad_() for t in drawn]


def gradients(out: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("queries", "keys"), SHARES)
def test_equals_the_definition(queries: int, keys: int, dtype: torch.dtype) -> None:
    functions: list[Attention] = [shard_attention, *([causal_attention] if queries == keys else [])]
    for function in functions:
        leaves = inputs(queries, keys, dtype=dtype)
        found = function(*leaves, documents=DOCUMENTS)
        wanted = causal_attention_reference(*leaves, documents=DOCUMENTS)
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE[dtype])
        for grad, right in zip(gradients(found, leaves), gradients(wanted, leaves), strict=True):
            torch.testing.assert_close(grad, right, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("attention", [causal_attention, causal_attention_reference])
def test_equals_the_documents_alone(attention: Attention) -> None:
    """With grouped keys; the definition's mask as well."""
    leaves = inputs(24, 24, groups=2)
    together = attention(*leaves, documents=DOCUMENTS)
    sequences = []
    for b, lengths in enumerate(LENGTHS):
        documents = zip(*(t[:, [b]].split(lengths) for t in leaves), strict=True)
        sequences.append(torch.cat([attention(*document) for document in documents]))
    wanted = torch.cat(sequences, dim=1)
    torch.testing.assert_close(together, wanted, rtol=0, atol=1e-12)
    for grad, right in zip(gradients(together, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(grad, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", [causal_attention, shard_attention, causal_attention_reference])
def test_nothing_crosses(attention: Attention) -> None:
    """Whatever the other documents hold, one's outputs and its gradients have the same bits; others get exactly 0."""
    leaves = inputs(24, 24)
    own = torch.zeros(24, 2, dtype=torch.bool)
    own[1:10, 0] = True  # the second document of the first sequence
    results = []
    for shift in (0.0, 3.0):
        changed = [torch.where(own[:, :, None, None], t, t + shift).detach().requires_grad_() for t in leaves]
        out = attention(*changed, documents=DOCUMENTS)
        grads = torch.autograd.grad(out[own].square().sum(), changed)
        assert not any(grad[~own].any() for grad in grads)
        results.append([out[own], *(grad[own] for grad in grads)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.any()


def test_one_call_per_length_and_no_scores() -> None:
    calls: list[tuple[int, ...]] = []

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append((query.shape[0], key.shape[0], query.shape[1]))
        return shard_attention(query, key, value)

    with ShapeRecorder() as recorder:
        by_document(attention, *inputs(24, 24), DOCUMENTS).sum().backward()
    assert sorted(calls) == [(1, 1, 3), (7, 7, 1), (8, 8, 2), (9, 9, 1), (13, 13, 1)]
    assert recorder.count > 5 and not recorder.with_twice(24)
    calls.clear()
    by_document(attention, *inputs(12, 24), DOCUMENTS)
    assert sorted(calls) == [(1, 1, 1), (4, 8, 1), (7, 7, 1), (12, 13, 1)]


def test_one_document_per_sequence_is_the_plain_call() -> None:
    leaves = inputs(24, 24)
    starts = starts_of((24,), (24,))
    whole = Documents(((24,), (24,)), (24, 24), starts, starts + 24, starts[:, 0] + 23, torch.tensor([0, 24, 48]))
    seen: list[Tensor] = []

    def attention(*tensors: Tensor) -> Tensor:
        seen.extend(tensors)
        return causal_attention(*tensors)

    by_document(attention, *leaves, whole)
    assert all(a is b for a, b in zip(seen, leaves, strict=True))
