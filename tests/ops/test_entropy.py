"""Entropy of the last attention row, against a formula written out in float64 loops."""

import math

import pytest
import torch
from torch import Tensor

from megatron_sgt.ops import operators
from megatron_sgt.ops.attention import causal_scores
from megatron_sgt.ops.entropy import entropy_of_rows, last_row_entropy
from tests.helpers.documents import documents_of
from tests.helpers.loop_problems import DEVICE, DTYPES, IMPLEMENTATIONS
from tests.helpers.tensor_shapes import ShapeRecorder

# sequence, batch, heads, groups, head size
SHAPES = [(2, 1, 1, 1, 2), (7, 3, 5, 5, 6), (33, 2, 6, 2, 10), (17, 4, 8, 1, 4)]


def by_hand(query: Tensor, key: Tensor) -> list[float]:
    """The same in Python floats, one probability after the other."""
    length, batch, heads, size = query.shape
    repeat = heads // key.shape[2]
    result = []
    for n in range(heads):
        total = 0.0
        for b in range(batch):
            row = query[-1, b, n].double()
            scores = [float(row @ key[t, b, n // repeat].double()) / math.sqrt(size) for t in range(length)]
            highest = max(scores)
            norm = sum(math.exp(s - highest) for s in scores)
            probabilities = [math.exp(s - highest) / norm for s in scores]
            total -= sum(p * math.log(p) for p in probabilities if p > 0)
        result.append(total / batch / math.log(length))
    return result


def random_qk(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    length, batch, heads, groups, size = shape
    generator = torch.Generator().manual_seed(0)
    # Wide queries, so that heads differ.
    query = 3.0 * torch.randn(length, batch, heads, size, generator=generator)
    return query.to(dtype), torch.randn(length, batch, groups, size, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Inputs may be rounded; the arithmetic is fp32 even for bf16 inputs."""
    query, key = random_qk(shape, dtype)
    entropy = last_row_entropy(query, key)
    assert entropy.dtype == torch.float32 and entropy.shape == (shape[2],)
    assert entropy.tolist() == pytest.approx(by_hand(query, key), abs=2e-6)


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="neither a GPU nor the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 2, 4, 2, 64)], ids=str)
def test_the_triton_kernel_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """From views of a fused projection, over several parts of the keys."""
    heads = shape[2]
    query, key = random_qk(shape, dtype)
    both = torch.cat([query, key], dim=2).to(DEVICE)
    found = operators.last_row_entropy(both[:, :, :heads], both[:, :, heads:])
    assert found.tolist() == pytest.approx(by_hand(query, key), abs=3e-6)


@pytest.mark.parametrize(("key_scale", "wanted"), [(0.0, 1.0), (1e3, 0.0)], ids=["even attention", "one position"])
def test_ends_of_the_scale(key_scale: float, wanted: float) -> None:
    key = key_scale * torch.arange(24.0).view(24, 1, 1, 1)
    entropy = last_row_entropy(torch.ones(24, 1, 2, 1), key)
    assert entropy.tolist() == pytest.approx([wanted] * 2, abs=1e-6)


def test_one_token() -> None:
    entropy = last_row_entropy(torch.randn(1, 2, 4, 8, dtype=torch.bfloat16), torch.randn(1, 2, 2, 8))
    assert entropy.dtype == torch.float32 and entropy.tolist() == [0.0] * 4


def test_only_the_last_query_counts_and_no_gradient_flows() -> None:
    query, key = (t.requires_grad_() for t in random_qk((9, 2, 4, 2, 6)))
    entropy = last_row_entropy(query, key)
    assert not entropy.requires_grad
    other = torch.cat([torch.randn(8, 2, 4, 6), query[-1:]])
    assert torch.equal(entropy, last_row_entropy(other, key))


def test_views_are_accepted() -> None:
    """Megatron's query is a view into the fused projection."""
    query, key = random_qk((9, 2, 4, 2, 6))
    fused = torch.cat([query, key], dim=2)
    views = fused.split([4, 2], dim=2)
    torch.testing.assert_close(last_row_entropy(*views), last_row_entropy(query, key))


def test_one_row_of_scores_per_head() -> None:
    query, key = random_qk((48, 2, 6, 3, 5))
    with ShapeRecorder() as recorder:
        last_row_entropy(query, key)
    assert recorder.count > 5
    assert not recorder.with_twice(48)


# Lengths and padding of four sequences: plain, padded, ended by too short a document, padding alone.
LENGTHS, PADDING = ((5, 19), (14, 10), (22, 2), (24,)), (0, 10, 0, 24)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("minimum", [2, 3, 15])
def test_documents_count_by_their_last_real_row(minimum: int, which: str) -> None:
    documents = documents_of(*LENGTHS, padding=PADDING, device=DEVICE)
    query, key = (t.to(DEVICE) for t in random_qk((24, 4, 4, 2, 16)))
    measure = last_row_entropy if which == "definition" else operators.last_row_entropy
    total, count = measure(query, key, documents, minimum)
    alone = {  # (first, end) of the last real document
        0: (5, 24),
        1: (0, 14),
        2: (22, 24),
    }
    counted = {b: (low, high) for b, (low, high) in alone.items() if high - low >= minimum}
    wanted = [by_hand(query[low:high, [b]], key[low:high, [b]]) for b, (low, high) in counted.items()]
    assert total.tolist() == pytest.approx([sum(heads) for heads in zip(*wanted, strict=True)], abs=3e-6)
    assert count.tolist() == [len(wanted)] * 4


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_ranks_with_shares_measure_each_sequence_once(which: str) -> None:
    """Each of three ranks has the queries of its share, and the keys up to them; sums and counts add up."""
    documents = documents_of(*LENGTHS, padding=PADDING, device=DEVICE)
    query, key = (t.to(DEVICE) for t in random_qk((24, 4, 4, 4, 16)))
    measure = last_row_entropy if which == "definition" else operators.last_row_entropy
    parts = [measure(query[low : low + 8], key[: low + 8], documents) for low in (0, 8, 16)]
    assert [int(part[1, 0]) for part in parts] == [0, 1, 2]
    torch.testing.assert_close(sum(parts), measure(query, key, documents), rtol=0, atol=1e-6)


def test_from_the_entropies_of_all_rows() -> None:
    documents = documents_of(*LENGTHS, padding=PADDING)
    query, key = random_qk((24, 4, 4, 4, 16))
    for low, keys in ((0, 24), (8, 16)):
        rows = torch.special.entr(causal_scores(query[low:keys], key[:keys], documents).softmax(-1)).sum(-1)
        found = entropy_of_rows(rows, keys, documents, 3)
        torch.testing.assert_close(found, last_row_entropy(query[low:keys], key[:keys], documents, 3))
