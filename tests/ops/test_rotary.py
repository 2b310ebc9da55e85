"""Rotary positions: the definition, Megatron-Core's and Hugging Face's convention, and the two quick functions."""

import shutil

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_sgt.ops.rotary import Rotary, RotaryTables, rotary_table, rotate, rotate_halves, rotate_heads
from tests.helpers.documents import documents_of
from tests.helpers.loop_problems import DEVICE, random

LENGTH, BATCH, SIZE = 12, 2, 8
# Of values of order 1; sums of two products, fp32 inside, rounded once.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 2e-2}


def angles(dtype: torch.dtype = torch.float32) -> Tensor:
    half = torch.arange(LENGTH, dtype=dtype).outer(0.5 ** torch.arange(SIZE // 2, dtype=dtype))
    return torch.cat([half, half], dim=-1)[:, None, None].to(DEVICE)


def heads(dtype: torch.dtype, grouped: bool = True) -> tuple[Tensor, Tensor]:
    """Queries and keys as views of a fused projection, as Megatron-Core has them."""
    fused = random(LENGTH, BATCH, 2, 3 * SIZE + 2 * SIZE if grouped else 3 * SIZE, seed=1, dtype=dtype)
    query = fused[..., : -2 * SIZE].reshape(LENGTH, BATCH, -1, SIZE)
    return query.detach().requires_grad_(), fused[..., -2 * SIZE : -SIZE].detach().requires_grad_()


def test_one_position_by_hand() -> None:
    """A quarter turn takes (1, 0) to (0, 1), half by half."""
    quarter = torch.full((1, 1), torch.pi / 2, dtype=torch.float64)
    turned = rotate(torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64), quarter.cos(), quarter.sin())
    torch.testing.assert_close(turned, torch.tensor([[[[0.0, 1.0]]]], dtype=torch.float64))


def test_equals_megatron_core() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True)
    query, key = heads(torch.float64)
    table = rotary_table(angles(torch.float64))
    for t in (query, key):
        wanted = apply_rotary_pos_emb(t, angles(torch.float64), config=config, cp_group=object())
        torch.testing.assert_close(rotate(t, table.cos, table.sin), wanted, rtol=0, atol=1e-14)


def test_products_depend_on_distances_alone() -> None:
    table = rotary_table(angles(torch.float64))
    one = random(1, 1, 1, SIZE, seed=2).expand(LENGTH, 1, 1, SIZE)
    other = random(1, 1, 1, SIZE, seed=3).expand(LENGTH, 1, 1, SIZE)
    q, k = (rotate(t, table.cos, table.sin)[:, 0, 0] for t in (one, other))
    products = q @ k.t()
    for distance in (0, 3):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(products[0, 0], products[0, 3])


compiled = pytest.mark.skipif(
    DEVICE.type == "cpu" and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)


@compiled
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_the_compiled_function_equals_the_definition(grouped: bool, dtype: torch.dtype) -> None:
    """Really compiled, forward and backward."""
    query, key = heads(dtype, grouped)
    table = rotary_table(angles(torch.float64 if dtype == torch.float64 else torch.float32), 1.3 if grouped else 1.0)
    turned = rotate_heads(query, key, table)
    exact = [t.detach().double().requires_grad_() for t in (query, key)]
    wanted = [rotate(t, table.cos.double(), table.sin.double()) for t in exact]
    pull = [random(*t.shape, seed=4 + n, dtype=dtype) for n, t in enumerate(turned)]
    grads = torch.autograd.grad(turned, [query, key], pull)
    wanted_grads = torch.autograd.grad(wanted, exact, [t.double() for t in pull])
    for found, right in zip((*turned, *grads), (*wanted, *wanted_grads), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), right, rtol=0, atol=4 * TOLERANCE[dtype])


def test_one_table_for_all_layers() -> None:
    tables, first = RotaryTables(), angles()
    table = tables.of(first)
    assert tables.of(first) is table and isinstance(table, Rotary)
    assert table.cos.shape == (LENGTH, SIZE // 2)
    torch.testing.assert_close(table.sin, first[:, 0, 0, : SIZE // 2].sin())
    assert tables.of(first[:5]).cos.shape[0] == 5


@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_the_attention_factor_is_in_the_table(factor: float) -> None:
    table, plain = RotaryTables(factor).of(angles()), rotary_table(angles())
    assert torch.equal(table.cos, factor * plain.cos) and torch.equal(table.sin, factor * plain.sin)
    head = random(LENGTH, BATCH, 1, SIZE, seed=5).requires_grad_()
    pull = random(LENGTH, BATCH, 1, SIZE, seed=6)
    turned, wanted = rotate_halves(head, table), rotate(head, table.cos, table.sin)
    torch.testing.assert_close(turned, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(t, head, pull)[0] for t in (turned, wanted)))


@compiled
def test_compiled_backward_keeps_no_heads() -> None:
    query, key = heads(torch.float32)
    table = rotary_table(angles())
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        rotate_heads(query, key, table)
    assert kept and all(shape in (table.cos.shape, ()) for shape in kept), kept


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_halves_equal_megatron_core_bit_for_bit(grouped: bool, dtype: torch.dtype) -> None:
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True)
    turns = angles(torch.float64 if dtype == torch.float64 else torch.float32)
    table = rotary_table(turns)
    for t in heads(dtype, grouped):
        wanted = apply_rotary_pos_emb(t, turns, config=config, cp_group=object())
        found = rotate_halves(t, table)
        assert found.dtype == dtype and torch.equal(found, wanted)
        pull = random(*t.shape, seed=4, dtype=dtype)
        assert torch.equal(*(torch.autograd.grad(turned, t, pull)[0] for turned in (found, wanted)))


def test_backward_of_halves_keeps_the_table_alone() -> None:
    query, _ = heads(torch.float32)
    table = rotary_table(angles())
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        rotate_halves(query, table)
    assert kept == [table.cos.data_ptr(), table.sin.data_ptr()]


def test_no_heads_turn_into_none() -> None:
    """A tensor-parallel rank that owns no kept head goes the same way as its peers."""
    none = torch.empty(LENGTH, BATCH, 0, SIZE, requires_grad=True)
    rotate_halves(none, rotary_table(angles())).sum().backward()
    assert none.grad is not None and none.grad.shape == none.shape


DOCUMENTS = documents_of((5, 1, 6), (7, 5), device=DEVICE)


def test_positions_begin_again_in_each_document() -> None:
    """As each document alone, bit for bit; with and without documents in turn from one object."""
    tables, turns = RotaryTables(1.25), angles()
    table, plain = tables.of(turns, DOCUMENTS), tables.of(turns)
    assert tables.of(turns, DOCUMENTS) is table and tables.of(turns) is plain
    assert tables.of(turns, documents_of((3, 9), (7, 5), device=DEVICE)) is not table
    assert table.cos.shape == (LENGTH, BATCH, SIZE // 2)
    query, _ = heads(torch.float32)
    turned = rotate_halves(query, table)
    for b, lengths in enumerate(DOCUMENTS.lengths):
        pieces = query[:, [b]].split(lengths)
        alone = [rotate_halves(piece, Rotary(plain.cos[: len(piece)], plain.sin[: len(piece)])) for piece in pieces]
        assert torch.equal(turned[:, [b]], torch.cat(alone))


@compiled
def test_all_rotations_take_tables_of_documents() -> None:
    table = rotary_table(angles(), 1.25).of_documents(DOCUMENTS)
    query, key = heads(torch.float32)
    wanted = [rotate(t, table.cos, table.sin) for t in (query, key)]
    pull = [random(*t.shape, seed=4 + n, dtype=torch.float32) for n, t in enumerate(wanted)]
    grads = torch.autograd.grad(wanted, [query, key], pull)
    for turned in ([rotate_halves(t, table) for t in (query, key)], rotate_heads(query, key, table)):
        torch.testing.assert_close(list(turned), wanted)
        torch.testing.assert_close(torch.autograd.grad(turned, [query, key], pull), grads)
