"""The operators of torch.ops.sgt: schemas, fake tensors and autograd agree with what they do."""

from typing import Any

import pytest
import torch

from megatron_sgt.ops import operators
from tests.helpers.loop_problems import CASES, Problem, problem, random

CHECKED = ("test_schema", "test_faketensor", "test_autograd_registration")


def arguments(p: Problem, operator: str) -> tuple[Any, ...]:
    shape, rotary, at = (p.case.length, p.case.batch), p.rotary, p.blocks
    forward = (
        p.x,
        p.norm_weight,
        p.weight,
        p.bias,
        at.rows,
        rotary.cos,
        rotary.sin,
        p.q_norm,
        p.k_norm,
        p.eps,
        at.heads,
    )
    qkv, r, before = operators.project_in(*forward)
    query, key, value = qkv.split([at.heads, at.groups, at.groups], dim=2)
    borders, rows = ((), ()) if p.documents is None else (
        (p.documents.starts, p.documents.ends), (p.documents.starts, p.documents.last)
    )  # fmt: skip
    out, lse, _ = operators.attend(query, key, value, at.gates, at.slots, True, *borders)
    coefficient, dout = random(*shape, seed=1, dtype=r.dtype), torch.ones_like(p.x)
    return {
        "project_in": forward,
        "attend": (query, key, value, at.gates, at.slots, True, *borders),
        "attend_backward": (torch.ones_like(out), query, key, value, out, lse, at.gates, at.slots, *borders),
        "project_out": (out, p.x, p.out_weight, at.columns),
        "output_gradient": (p.x, p.out_weight, at.columns, p.case.size),
        "head_gradients": (
            out, key, value, qkv, before, r, p.bias, at.rows, rotary.cos, rotary.sin, p.q_norm, p.k_norm, p.eps, 96
        ),
        "input_gradient": (qkv, coefficient, p.x, dout, p.norm_weight, p.weight, at.rows),
        "norm_weight_gradient": (
            torch.ones(len(at.row_index), 96, device=p.x.device), p.norm_weight, p.weight, at.rows,
            torch.zeros_like(p.weight), True
        ),
        "row_entropy": (query, query, *rows),
    }[operator]  # fmt: skip


@pytest.mark.parametrize("name", ["two heads", "biases, norm"])
@pytest.mark.parametrize(
    "operator",
    [
        "project_in", "attend", "attend_backward", "project_out", "output_gradient", "head_gradients",
        "input_gradient", "norm_weight_gradient", "row_entropy",
    ],
)  # fmt: skip
def test_opcheck(operator: str, name: str) -> None:
    p = problem(CASES[name], torch.float32)
    torch.library.opcheck(getattr(operators, operator), arguments(p, operator), test_utils=CHECKED)


@pytest.mark.parametrize("name", ["two heads", "biases, norm"])
def test_attention_is_differentiable_by_registration(name: str) -> None:
    p = problem(CASES[name], torch.float32)
    query, key, value, *rest = (t for t in arguments(p, "attend"))
    leaves = [t.detach().clone().requires_grad_() for t in (query, key, value)]
    checks = (*CHECKED, "test_aot_dispatch_dynamic")
    torch.library.opcheck(operators.attend, (*leaves, *rest), test_utils=checks)
    out, lse, rows = operators.attend(*leaves, *rest)
    assert out.requires_grad and not lse.requires_grad and not rows.requires_grad


def test_any_strides_are_accepted() -> None:
    """The attention reads views of the fused projection as they are, and copies what it cannot read."""
    query, key, value, *rest = arguments(problem(CASES["two heads"], torch.float32), "attend")
    wanted = operators.attend(query, key, value, *rest)
    turned = [t.transpose(0, 3).contiguous().transpose(0, 3) for t in (query, key, value)]
    assert turned[0].stride(-1) != 1
    for found, out in zip(operators.attend(*turned, *rest), wanted, strict=True):
        torch.testing.assert_close(found, out)


def test_double_precision_and_cpus_take_the_definition() -> None:
    p = problem(CASES["two heads"], torch.float64)
    qkv, r, _ = operators.project_in(*arguments(p, "project_in"))
    assert qkv.dtype == r.dtype == torch.float64
