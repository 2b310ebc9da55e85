"""Attention of the kept heads: the definition against autograd, implementations against it in fp64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgt.ops import loop_attention as definitions
from megatron_sgt.ops.attention import causal_attention_reference, causal_scores
from tests.helpers.documents import documents_of
from tests.helpers.loop_problems import (
    DEVICE,
    DTYPES,
    IMPLEMENTATIONS,
    TOLERANCE,
    assert_near,
    exact,
    implementation,
    random,
)

FORWARD, BACKWARD = "loop_attention_triton", "loop_attention_backward_triton"
# queries, keys, batch, head size, slots (their number: heads), groups
SHAPES = {
    "square": (128, 128, 2, 16, (0, 1), 2),
    "ragged": (67, 67, 1, 64, (0, 1), 2),
    "offset": (48, 112, 2, 16, (0, 1), 2),
    "split keys": (200, 200, 1, 16, (1, 0), 2),
    "offset, ragged, split": (33, 161, 1, 32, (0, 0, 1), 2),
    "one shared group": (65, 65, 2, 16, (0, 0), 1),
    "d128, uneven groups": (96, 160, 1, 128, (1, 0, 1), 2),
    "one query": (1, 70, 1, 16, (0,), 1),
}
# The shape, and the documents of its K positions (or more): in their sequences, and the padding.
DOCUMENTS = {
    "boundaries inside tiles": ((100, 100, 2, 16, (0, 1), 2), ((30, 1, 40, 29), (64, 36)), (0, 36)),
    "split keys": ((200, 200, 1, 16, (1, 0), 2), ((70, 1, 1, 100, 28),), (0,)),
    "a share, with documents before it": ((33, 161, 1, 32, (0, 0, 1), 2), ((20, 60, 70, 30),), (0,)),
}
GATES = {"open": 1.0, "fading": 0.37, "almost closed": 1e-6, "closed": 0.0}


def inputs(shape: tuple[Any, ...], dtype: torch.dtype, gate: float = 1.0, scale: float = 1.0) -> list[Any]:
    """Query, key and value as views of fused buffers, as the loop has them; gates; slots. The first head is open."""
    queries, keys, batch, size, slots, groups = shape
    heads = len(slots)
    query = scale * random(queries, batch, heads + 1, size, seed=1, dtype=dtype)[:, :, :heads]
    both = random(keys, batch, 2 * groups, size, seed=2, dtype=dtype)
    gates = torch.full((heads,), gate, device=DEVICE)
    slots = torch.tensor(slots, dtype=torch.int32).to(DEVICE)
    if heads > 1:
        gates[0] = 1.0
    return [query, scale * both[:, :, :groups], both[:, :, groups:], gates, slots]


def backward_arguments(arguments: list[Any]) -> list[Any]:
    query, key, value, gates, slots = arguments
    out, lse, _ = definitions.attend(*exact(*arguments), False)
    dout = random(*query.shape, seed=3, dtype=query.dtype)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return [dout, query, key, value, out.to(query.dtype), lse.to(wide), gates, slots]


@pytest.mark.parametrize("gate", [1.0, 0.37])
@pytest.mark.parametrize("name", SHAPES)
def test_the_definition_equals_autograd(name: str, gate: float) -> None:
    """In fp64, through one head at a time."""
    query, key, value, gates, slots = inputs(SHAPES[name], torch.float64, gate)
    leaves = [t.detach().clone().requires_grad_() for t in (query, key, value)]
    outs, entropies = [], []
    for head, slot in enumerate(slots.tolist()):
        q, k, v = (t[:, :, [n]] for t, n in zip(leaves, (head, slot, slot), strict=True))
        outs.append(gates[head].double() * causal_attention_reference(q, k, v))
        scores = torch.einsum("qbnh,kbnh->bnqk", q, k) / math.sqrt(q.shape[-1])
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        entropies.append(torch.special.entr(scores.masked_fill(hidden, -math.inf).softmax(-1)).sum(-1))
    wanted = torch.cat(outs, dim=2)
    out, _, entropy = definitions.attend(query, key, value, gates, slots, True)
    assert_near((out, entropy), (wanted, torch.cat(entropies, dim=1)), 1e-13)
    arguments = backward_arguments([query, key, value, gates, slots])
    grads = torch.autograd.grad(wanted, leaves, arguments[0])
    assert_near(definitions.attend_backward(*arguments), grads, 1e-13)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_definition(name: str, dtype: torch.dtype, which: str) -> None:
    arguments = inputs(SHAPES[name], dtype, 0.37)
    found = implementation(which, definitions.attend, FORWARD)(*arguments, True)
    assert_near(found, definitions.attend(*exact(*arguments), True), TOLERANCE[dtype], "attend")
    without = implementation(which, definitions.attend, FORWARD)(*arguments, False)
    assert torch.equal(without[0], found[0]) and without[2].numel() == 0
    arguments = backward_arguments(arguments)
    found = implementation(which, definitions.attend_backward, BACKWARD)(*arguments)
    assert_near(found, definitions.attend_backward(*exact(*arguments)), 2 * TOLERANCE[dtype], "backward")


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_equal_the_definition(name: str, which: str) -> None:
    """The definition against autograd through scores with a mask."""
    shape, lengths, padding = DOCUMENTS[name]
    documents = documents_of(*lengths, padding=padding, device=DEVICE)
    dtype = torch.float64 if which == "definition" else torch.float32
    arguments, borders = inputs(shape, dtype, 0.37), (documents.starts, documents.ends)
    query, key, value, gates, slots = exact(*arguments)
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    q, k, v = leaves[0], *(t[:, :, slots.long()] for t in leaves[1:])
    out = gates[:, None] * causal_attention_reference(q, k, v, documents)
    p = causal_scores(q, k, documents).softmax(-1)
    lse = definitions.attend(query, key, value, gates, slots, False, *borders)[1]
    backward = backward_arguments(arguments)
    backward[4:6] = out.detach().to(dtype).contiguous(), lse.to(dtype)
    grads = torch.autograd.grad(out, leaves, backward[0].double())
    found = implementation(which, definitions.attend, FORWARD)(*arguments, True, *borders)
    tolerance = 1e-13 if which == "definition" else TOLERANCE[dtype]
    assert_near((found[0], found[2]), (out, torch.special.entr(p).sum(-1)), tolerance, "attend")
    assert_near([found[1]], [lse], tolerance, "log-sum-exp")
    found = implementation(which, definitions.attend_backward, BACKWARD)(*backward, *borders)
    assert_near(found, grads, 2 * tolerance, "backward")


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_nothing_crosses_documents(which: str) -> None:
    """The second document's outputs and gradients have the same bits whatever the others hold; others get exactly 0."""
    documents = documents_of((50, 60, 22), device=DEVICE)
    own, borders = slice(50, 110), (documents.starts, documents.ends)
    results = []
    for shift in (0.0, 3.0):
        query, key, value, gates, slots = inputs((132, 132, 1, 16, (1, 0), 2), torch.float32)
        tensors = [t.clone() for t in (query, key, value)]
        for t in tensors:
            t[:50] += shift
            t[110:] -= shift
        out, lse, rows = implementation(which, definitions.attend, FORWARD)(*tensors, gates, slots, True, *borders)
        dout = torch.zeros_like(out)
        dout[own] = 1.0
        backward = implementation(which, definitions.attend_backward, BACKWARD)
        grads = backward(dout, *tensors, out, lse, gates, slots, *borders)
        assert not any(grad[:50].any() or grad[110:].any() for grad in grads)
        results.append([out[own], rows[..., own], *(grad[own] for grad in grads)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.any()


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("gate", GATES)
def test_gates(gate: str, which: str) -> None:
    """A closed gate gives exact zeros, forward and in its head's gradients, and leaves the open head alone."""
    arguments = inputs(SHAPES["square"], torch.float32, GATES[gate])
    out, _, entropy = implementation(which, definitions.attend, FORWARD)(*arguments, True)
    backward = backward_arguments(arguments)
    grads = implementation(which, definitions.attend_backward, BACKWARD)(*backward)
    assert_near((out, entropy), definitions.attend(*exact(*arguments), True)[::2], TOLERANCE[torch.float32])
    assert_near(grads, definitions.attend_backward(*exact(*backward)), 2 * TOLERANCE[torch.float32])
    assert all(bool(t.isfinite().all()) for t in (out, *grads))
    if gate == "closed":
        assert all(not t[:, :, 1].any() for t in (out, *grads))
    assert all(bool(t[:, :, 0].any()) for t in (out, *grads))


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_peaked_rows_stay_exact(which: str) -> None:
    """Scores of some hundreds: nothing overflows, and entropies do not cancel."""
    arguments = inputs(SHAPES["split keys"], torch.float32, scale=8.0)
    found = implementation(which, definitions.attend, FORWARD)(*arguments, True)
    wanted = definitions.attend(*exact(*arguments), True)
    assert float(wanted[1].abs().max()) > 150
    assert_near(found, wanted, 5e-5)


def test_entropies_of_even_attention() -> None:
    """Equal scores: row i spreads over i + 1 keys, so its entropy is ln(i + 1), and its output their mean."""
    query = torch.zeros(4, 1, 1, 16, device=DEVICE)
    value: Tensor = torch.arange(4.0, device=DEVICE).view(4, 1, 1, 1).expand(4, 1, 1, 16)
    one = torch.ones(1, device=DEVICE)
    for which in IMPLEMENTATIONS:
        run = implementation(which, definitions.attend, FORWARD)
        out, _, rows = run(query, query, value.contiguous(), one, one.int() * 0, True)
        assert rows.flatten().tolist() == pytest.approx([math.log(i + 1) for i in range(4)], abs=1e-6)
        assert out[:, 0, 0, 0].tolist() == pytest.approx([0.0, 0.5, 1.0, 1.5], abs=1e-6)
