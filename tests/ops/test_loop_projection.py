"""Projections of a loop pass: definitions against autograd, implementations against definitions in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgt.ops import loop_projection as definitions
from tests.helpers.loop_problems import (
    CASES,
    DTYPES,
    IMPLEMENTATIONS,
    TOLERANCE,
    Problem,
    assert_near,
    exact,
    implementation,
    problem,
    random,
)

FORWARD, BACKWARD = "loop_projection_triton", "loop_projection_backward_triton"
every_case = pytest.mark.parametrize("name", CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_implementation = pytest.mark.parametrize("which", IMPLEMENTATIONS)


def project_in_arguments(p: Problem) -> list[Any]:
    rotary = p.rotary
    return [
        p.x, p.norm_weight, p.weight, p.bias, p.blocks.rows, rotary.cos, rotary.sin,
        p.q_norm, p.k_norm, p.eps, p.blocks.heads,
    ]  # fmt: skip


def head_gradient_arguments(p: Problem) -> list[Any]:
    qkv, r, before = definitions.project_in(*project_in_arguments(p))
    shape, rotary = (p.case.length, p.case.batch), p.rotary
    grads = [
        random(*shape, n, p.case.size, seed=10 + i, dtype=p.x.dtype)
        for i, n in enumerate((p.blocks.heads, p.blocks.groups, p.blocks.groups))
    ]
    return [
        *grads, qkv, before, r, p.bias, p.blocks.rows, rotary.cos, rotary.sin, p.q_norm, p.k_norm, p.eps, p.case.width
    ]  # fmt: skip


def input_gradient_arguments(p: Problem, residual: bool) -> list[Any]:
    shape = (p.case.length, p.case.batch)
    scaled = random(*shape, len(p.blocks.rows), p.case.size, seed=20, dtype=p.x.dtype)
    coefficient = random(*shape, seed=21, dtype=torch.float32)
    dout = random(*p.x.shape, seed=22, dtype=p.x.dtype) if residual else None
    return [scaled, coefficient, p.x, dout, p.norm_weight, p.weight, p.blocks.rows]


def check(which: str, function: Any, module: str, arguments: list[Any], tolerance: float) -> None:
    found = implementation(which, function, module)(*arguments)
    wanted = function(*exact(*arguments))
    if isinstance(found, Tensor):
        found, wanted = (found,), (wanted,)
    assert_near(found, wanted, tolerance, function.__name__)


@every_implementation
@every_dtype
@every_case
def test_project_in(name: str, dtype: torch.dtype, which: str) -> None:
    arguments = project_in_arguments(problem(CASES[name], dtype))
    check(which, definitions.project_in, FORWARD, arguments, TOLERANCE[dtype])


@every_implementation
@every_dtype
@every_case
def test_head_gradients(name: str, dtype: torch.dtype, which: str) -> None:
    arguments = head_gradient_arguments(problem(CASES[name], dtype))
    check(which, definitions.head_gradients, BACKWARD, arguments, 2 * TOLERANCE[dtype])


@every_implementation
@every_dtype
@pytest.mark.parametrize("name", ["two heads", "d64, ragged", "uneven groups, norm"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_the_other_products(name: str, residual: bool, dtype: torch.dtype, which: str) -> None:
    p = problem(CASES[name], dtype)
    check(which, definitions.input_gradient, BACKWARD, input_gradient_arguments(p, residual), TOLERANCE[dtype])
    heads = random(p.case.length, p.case.batch, p.blocks.heads, p.case.size, seed=30, dtype=dtype)
    arguments = [heads, p.x if residual else None, p.out_weight, p.blocks.columns]
    check(which, definitions.project_out, FORWARD, arguments, TOLERANCE[dtype])
    arguments = [p.x, p.out_weight, p.blocks.columns, p.case.size]
    check(which, definitions.output_gradient, BACKWARD, arguments, TOLERANCE[dtype])


@every_implementation
@every_dtype
@every_case
@pytest.mark.parametrize("add", [False, True], ids=["dense", "main_grad"])
def test_norm_weight_gradient(add: bool, name: str, dtype: torch.dtype, which: str) -> None:
    """Into a dense gradient in the weights' type, or onto what a main_grad buffer holds; other rows are left alone."""
    p = problem(CASES[name], dtype)
    product = random(len(p.blocks.row_index), p.case.width, seed=60, dtype=torch.float32)
    start = random(*p.weight.shape, seed=61, dtype=torch.float32 if add else dtype)
    run = implementation(which, definitions.norm_weight_gradient, BACKWARD)
    found, wanted = start.clone(), start.double()
    found_sum = run(product, p.norm_weight, p.weight, p.blocks.rows, found, add)
    exactly = exact(product, p.norm_weight, p.weight, p.blocks.rows)
    wanted_sum = definitions.norm_weight_gradient(*exactly, wanted, add)
    assert_near([found, found_sum], [wanted, wanted_sum], TOLERANCE[dtype], "norm_weight_gradient")
    others = torch.ones(len(start), dtype=torch.bool, device=start.device)
    others[p.blocks.row_index] = False
    assert torch.equal(found[others], start[others])


def test_rows_by_hand() -> None:
    """Two heads of one group, of which the second is kept: its query block, then the key's and the value's."""
    starts = torch.tensor([2, 4, 6], dtype=torch.int32)
    assert definitions.block_indices(starts, 2).tolist() == [2, 3, 4, 5, 6, 7]
    assert definitions.blocks(torch.arange(8.0), starts[:1], 2).tolist() == [2.0, 3.0]
