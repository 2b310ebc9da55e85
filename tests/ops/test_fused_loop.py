"""The fused loop's algebra: one to three loops in fp64 against plain autograd, and where gradients go."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron_sgt.ops import fused_loop
from megatron_sgt.ops.attention import causal_attention_reference
from megatron_sgt.ops.backend import runs_triton
from megatron_sgt.ops.head_blocks import whole_blocks
from megatron_sgt.ops.loop_projection import block_indices
from megatron_sgt.ops.norm import rms_norm_reference
from megatron_sgt.ops.rotary import rotate
from megatron_sgt.parallel.packed_copy import on_device
from tests.helpers.loop_problems import (
    CASES,
    DEVICE,
    DTYPES,
    IMPLEMENTATIONS,
    TOLERANCE,
    Problem,
    assert_near,
    exact,
    problem,
    random,
)

Pass = Callable[[Problem, Tensor], Tensor]


def fused_pass(p: Problem, x: Tensor) -> Tensor:
    query, key, value, residual = fused_loop.project_in(
        x, p.norm_weight, p.weight, p.bias, p.head_norms, p.blocks, p.rotary, p.eps
    )
    out, _ = fused_loop.attend(query, key, value, p.blocks, False, p.documents)
    return fused_loop.project_out(out, residual, p.out_weight, p.blocks)


def plain_pass(p: Problem, x: Tensor) -> Tensor:
    """The same, one step after the other, differentiated by autograd."""
    blocks, size = p.blocks, p.case.size
    rows = block_indices(blocks.rows, size)
    bias = None if p.bias is None else p.bias[rows]
    fused = F.linear(rms_norm_reference(x, p.norm_weight, p.eps), p.weight[rows], bias)
    query, key, value = fused.unflatten(-1, (-1, size)).split([blocks.heads, blocks.groups, blocks.groups], dim=2)
    if p.head_norms is not None:
        query, key = (rms_norm_reference(t, w, p.eps) for t, w in zip((query, key), p.head_norms, strict=True))
    query, key = (rotate(t, p.rotary.cos, p.rotary.sin) for t in (query, key))
    key, value = (t[:, :, blocks.slots.long()] for t in (key, value))
    out = blocks.gates.to(x)[:, None] * causal_attention_reference(query, key, value, p.documents)
    return x + F.linear(out.flatten(2), p.out_weight[:, block_indices(blocks.columns, size)])


def with_gates(p: Problem, gate: float) -> Problem:
    gates = torch.full_like(p.blocks.gates, gate)
    return replace(p, blocks=replace(p.blocks, gates=gates))


def gradients(p: Problem, one_pass: Pass, loops: int) -> tuple[Tensor, ...]:
    """Output after ``loops`` passes, and gradients of x and every weight."""
    leaves = [t.requires_grad_() for t in p.parameters()]
    x = p.x
    for _ in range(loops):
        x = one_pass(p, x)
    return x, *torch.autograd.grad(x, leaves, random(*x.shape, seed=50, dtype=x.dtype))


@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_equals_autograd(name: str, loops: int) -> None:
    p = problem(CASES[name], torch.float64)
    assert_near(gradients(p, fused_pass, loops), gradients(p, plain_pass, loops), 1e-12)


def widened(p: Problem) -> Problem:
    """The same values in fp64."""
    names = ("x", "norm_weight", "weight", "bias", "out_weight", "q_norm", "k_norm", "angles")
    wide = {name: exact(getattr(p, name))[0] for name in names}
    return replace(p, **wide)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("loops", [1, 2, 3])
def test_loops_through_the_operators(loops: int, gate: float, dtype: torch.dtype, which: str) -> None:
    """The whole pass as in a run, with kernels where Triton runs, against autograd in fp64."""
    assert runs_triton(DEVICE) or which == "definition"
    p = with_gates(problem(CASES["uneven groups, norm"], dtype), gate)
    wanted = gradients(widened(p), plain_pass, loops)
    found = gradients(p, fused_pass, loops)
    # Every pass rounds the residual stream to dtype, and a gradient is the sum over the passes.
    assert_near(found, wanted, 4 * loops * TOLERANCE[dtype])
    if gate == 0.0:
        assert torch.equal(found[0], p.x) and all(not g.any() for g in found[2:])


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_every_shape_through_the_operators(name: str, which: str) -> None:
    assert runs_triton(DEVICE) or which == "definition"
    p = problem(CASES[name], torch.float32)
    wanted = gradients(widened(p), plain_pass, 1)
    assert_near(gradients(p, fused_pass, 1), wanted, 4 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("gate", [0.0, 1e-6, 0.4])
def test_gates(gate: float) -> None:
    """Any gate; at 0 the pass gives its input back, and no weight has a gradient."""
    p = with_gates(problem(CASES["uneven groups, norm"], torch.float64), gate)
    found = gradients(p, fused_pass, 2)
    assert_near(found, gradients(p, plain_pass, 2), 1e-12)
    if gate == 0.0:
        assert torch.equal(found[0], p.x)
        assert torch.equal(found[1], random(*p.x.shape, seed=50))
        assert all(not g.any() for g in found[2:])


def test_main_grad_gets_what_autograd_would() -> None:
    """Gradients are added into the right rows and columns of fp32 buffers, and autograd gets none."""
    p = problem(CASES["biases"], torch.float64)
    wanted = gradients(p, fused_pass, 2)
    names = p.parameters()[1:]
    for n, parameter in enumerate(names):
        parameter.main_grad = torch.full_like(parameter, 0.5 * n)
        parameter.grad = None
    p.x.grad = None
    out = fused_pass(p, fused_pass(p, p.x))
    out.backward(random(*out.shape, seed=50))
    assert p.x.grad is not None
    assert_near([p.x.grad], [wanted[1]], 1e-13)
    for n, (parameter, grad) in enumerate(zip(names, wanted[2:], strict=True)):
        assert parameter.grad is None
        assert_near([parameter.main_grad - 0.5 * n], [grad], 1e-12)


def test_a_main_grad_that_would_be_written_in_vain() -> None:
    p = problem(CASES["two heads"], torch.float64)
    p.weight.main_grad = torch.zeros_like(p.weight.t().contiguous()).t()
    out = fused_pass(p, p.x.requires_grad_())
    with pytest.raises(ValueError, match="main_grad of a looped projection must be contiguous"):
        out.sum().backward()


def test_weights_of_any_strides() -> None:
    p = problem(CASES["two heads"], torch.float64)
    turned = replace(p, weight=p.weight.t().contiguous().t(), out_weight=p.out_weight.t().contiguous().t())
    assert_near(gradients(turned, fused_pass, 1), gradients(p, fused_pass, 1), 1e-13)


def test_kept_rows_alone() -> None:
    """A weight that consists of the kept rows gives the same, with a gradient of its own shape."""
    p = problem(CASES["shared group"], torch.float64)
    rows, columns = block_indices(p.blocks.rows, p.case.size), block_indices(p.blocks.columns, p.case.size)
    whole = on_device(whole_blocks(p.case.layout, p.case.kept), DEVICE)
    kept = replace(p, weight=p.weight[rows].clone(), out_weight=p.out_weight[:, columns].clone(), blocks=whole)
    found, wanted = gradients(kept, fused_pass, 1), list(gradients(p, fused_pass, 1))
    wanted[3], wanted[4] = wanted[3][rows], wanted[4][:, columns]
    assert_near(found, wanted, 1e-13)


class Operations(TorchDispatchMode):
    """Counts operations that do something: on a GPU each is a launch at least, those of ``sgt`` one to three."""

    NOTHING = (
        "view",
        "detach",
        "t",
        "transpose",
        "split",
        "split_with_sizes",
        "unsqueeze",
        "_unsafe_view",
        "permute",
    )

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in self.NOTHING and not name.startswith(("empty", "new_empty")):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def test_a_pass_is_few_operations() -> None:
    """In fp32, where products need no conversion of their operands on a CPU either."""
    p = problem(CASES["two heads"], torch.float32)
    leaves, rotary = [t.requires_grad_() for t in p.parameters()], p.rotary
    with Operations() as forward:
        query, key, value, residual = fused_loop.project_in(
            p.x, p.norm_weight, p.weight, p.bias, p.head_norms, p.blocks, rotary, p.eps
        )
        out, _ = fused_loop.attend(query, key, value, p.blocks, False, p.documents)
        out = fused_loop.project_out(out, residual, p.out_weight, p.blocks)
    with Operations() as backward:
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert forward.counts == Counter(["project_in", "attend", "project_out"])
    kernels = [
        "output_gradient",
        "attend_backward",
        "head_gradients",
        "input_gradient",
        "norm_weight_gradient",
    ]
    # Weight gradients: two products into dense gradients, of which the kernel above writes one.
    products = ["mm", "mm", "zeros_like", "zeros_like", "index_copy_"]
    counts = backward.counts - Counter(["ones_like"])
    assert counts == Counter(kernels + products)


def test_recompute_gives_the_same_bits() -> None:
    p = problem(CASES["two heads"], torch.float32)

    def recomputed(p: Problem, x: Tensor) -> Tensor:
        return checkpoint(fused_pass, p, x, use_reentrant=False)

    for a, b in zip(gradients(p, recomputed, 2), gradients(p, fused_pass, 2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["two heads", "uneven groups, norm", "biases, norm"])
def test_compiles_as_one_graph(name: str) -> None:
    """aot_eager: traced through fake tensors, forward and backward, without a break."""
    p = problem(CASES[name], torch.float64)
    rotary = p.rotary  # outside of the graph, as in the model

    def one_pass(x: Tensor, norm: Tensor, weight: Tensor, out_weight: Tensor) -> Tensor:
        query, key, value, residual = fused_loop.project_in(
            x, norm, weight, p.bias, p.head_norms, p.blocks, rotary, p.eps
        )
        out, _ = fused_loop.attend(query, key, value, p.blocks, False, p.documents)
        return fused_loop.project_out(out, residual, out_weight, p.blocks)

    torch._dynamo.reset()
    compiled = torch.compile(one_pass, backend="aot_eager", fullgraph=True)
    weights = [t.requires_grad_() for t in (p.x, p.norm_weight, p.weight, p.out_weight)]
    found, wanted = compiled(*weights), one_pass(*weights)
    pull = random(*found.shape, seed=50)
    assert_near([found], [wanted], 1e-13)
    assert_near(torch.autograd.grad(found, weights, pull), torch.autograd.grad(wanted, weights, pull), 1e-12)
