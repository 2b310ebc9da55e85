"""The fused loop's operations under ``torch.ops.sgt``: a Triton kernel on GPUs, the definition elsewhere.

As registered operators they are opaque to torch.compile, have shapes without data (fake tensors), and count as one
operation under activation recompute. Schemas are written out, so that nothing depends on how annotations are read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_sgt.ops import entropy as entropy_definition
from megatron_sgt.ops import loop_attention, loop_projection
from megatron_sgt.ops.backend import runs_triton
from megatron_sgt.ops.documents import Documents

_PACKAGE = "megatron_sgt.ops"
# Registered by hand: torch.library.custom_op adds several microseconds of Python to every launch.
_LIBRARY = torch.library.Library("sgt", "DEF")


def _register(name: str, schema: str, function: Callable[..., Any]) -> Any:
    """Make ``function`` the implementation of sgt::``name`` on every device."""
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.sgt, name).default


def _fake(operator: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what is decorated as ``operator`` on tensors without data: shapes and types of its results."""
    return torch.library.register_fake(operator.name(), lib=_LIBRARY)


def _implementation(definition: Callable[..., Any], module: str, x: Tensor) -> Callable[..., Any]:
    """The Triton version of ``definition`` if it runs on x's device, else the definition itself."""
    if x.dtype != torch.float64 and runs_triton(x.device):
        return getattr(importlib.import_module(f"{_PACKAGE}.{module}"), definition.__name__)
    return definition


def _contiguous(arguments: tuple[Any, ...], views: bool) -> tuple[Any, ...]:
    """Tensors as the kernels read them: contiguous, or (``views``) with a last stride of 1 at least."""

    def ready(t: Tensor) -> Tensor:
        return t if views and t.stride()[-1:] == (1,) else t.contiguous()

    return tuple(ready(t) if isinstance(t, Tensor) else t for t in arguments)


def _operator(definition: Callable[..., Any], module: str, schema: str, views: bool = False) -> Callable[..., Any]:
    """Register ``definition`` as sgt::<its name>, with its Triton version in ``module``.

    An argument that the schema marks as written to must be contiguous; otherwise the result would stay in a copy.
    """

    def run(*args: Any) -> Any:
        args = _contiguous(args, views)
        return _implementation(definition, module, args[0])(*args)

    return _register(definition.__name__, schema, run)


project_in: Any = _operator(
    loop_projection.project_in,
    "loop_projection_triton",
    "(Tensor x, Tensor norm_weight, Tensor weight, Tensor? bias, Tensor rows, Tensor cos, Tensor sin, "
    "Tensor? q_norm, Tensor? k_norm, float eps, int heads) -> (Tensor, Tensor, Tensor)",
)
project_out: Any = _operator(
    loop_projection.project_out,
    "loop_projection_triton",
    "(Tensor heads, Tensor? residual, Tensor weight, Tensor columns) -> Tensor",
)
output_gradient: Any = _operator(
    loop_projection.output_gradient,
    "loop_projection_backward_triton",
    "(Tensor dout, Tensor weight, Tensor columns, int size) -> Tensor",
)
head_gradients: Any = _operator(
    loop_projection.head_gradients,
    "loop_projection_backward_triton",
    "(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor before, Tensor r, Tensor? bias, Tensor rows, Tensor cos, "
    "Tensor sin, Tensor? q_norm, Tensor? k_norm, float eps, int width) -> (Tensor, Tensor, Tensor)",
)
input_gradient: Any = _operator(
    loop_projection.input_gradient,
    "loop_projection_backward_triton",
    "(Tensor scaled, Tensor coefficient, Tensor x, Tensor? dout, Tensor norm_weight, Tensor weight, Tensor rows)"
    " -> Tensor",
)
norm_weight_gradient: Any = _operator(
    loop_projection.norm_weight_gradient,
    "loop_projection_backward_triton",
    "(Tensor product, Tensor norm_weight, Tensor weight, Tensor rows, Tensor(a!) target, bool add) -> Tensor",
)
attend: Any = _operator(
    loop_attention.attend,
    "loop_attention_triton",
    "(Tensor query, Tensor key, Tensor value, Tensor gates, Tensor slots, bool entropy, "
    "Tensor? starts=None, Tensor? ends=None) -> (Tensor, Tensor, Tensor)",
    views=True,
)
attend_backward: Any = _operator(
    loop_attention.attend_backward,
    "loop_attention_backward_triton",
    "(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor gates, Tensor slots, "
    "Tensor? starts=None, Tensor? ends=None) -> (Tensor, Tensor, Tensor)",
    views=True,
)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@_fake(project_in)
def _(
    x: Tensor, norm: Tensor, weight: Tensor, bias: Any, rows: Tensor, cos: Tensor, sin: Tensor,
    q_norm: Any, k_norm: Any, eps: float, heads: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    length, batch, _ = x.shape
    count, size = rows.shape[0], 2 * cos.shape[-1]
    normed = (count - heads) // 2 + heads
    before = x.new_empty(0) if q_norm is None else x.new_empty(length, batch, normed, size)
    return x.new_empty(length, batch, count, size), x.new_empty(length, batch, dtype=_wide(x)), before


@_fake(project_out)
def _(heads: Tensor, residual: Any, weight: Tensor, columns: Tensor) -> Tensor:
    return heads.new_empty(*heads.shape[:2], weight.shape[0])


@_fake(output_gradient)
def _(dout: Tensor, weight: Tensor, columns: Tensor, size: int) -> Tensor:
    return dout.new_empty(*dout.shape[:2], columns.shape[0], size)


@_fake(head_gradients)
def _(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, before: Tensor, r: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    normed = before.numel() > 0
    return qkv.new_empty(qkv.shape), r.new_empty(r.shape), r.new_empty((2, dq.shape[-1]) if normed else 0)


@_fake(norm_weight_gradient)
def _(product: Tensor, *rest: Any) -> Tensor:
    return product.new_empty(product.shape[1])


@_fake(input_gradient)
def _(scaled: Tensor, coefficient: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


@_fake(attend)
def _(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor, slots: Tensor, entropy: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    queries, batch, heads, _ = query.shape
    lse = query.new_empty(batch, heads, queries, dtype=_wide(query))
    return query.new_empty(query.shape), lse, lse.new_empty(lse.shape if entropy else 0)


@_fake(attend_backward)
def _(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, gates, slots, _, starts, ends = inputs
    out, lse, rows = output
    ctx.mark_non_differentiable(lse, rows)
    # Otherwise every backward pass would fill gradients of lse and rows with zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, out, lse, gates, slots, starts, ends)


def _differentiate_attend(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    return *attend_backward(dout.contiguous(), *ctx.saved_tensors), *(None,) * 5


torch.library.register_autograd(attend.name(), _differentiate_attend, setup_context=_save_attend, lib=_LIBRARY)


def _entropy(
    query: Tensor, key: Tensor, starts: Tensor | None = None, last: Tensor | None = None, minimum: int = 2
) -> Tensor:
    readable = query.stride(-1) == key.stride(-1) == 1
    if starts is not None and last is not None:
        definition = entropy_definition.documents_entropy
        run = _implementation(definition, "entropy_triton", query) if readable else definition
        return run(query, key, starts, last, minimum)
    if query.shape[0] > 1 and readable:
        return _implementation(entropy_definition.last_row_entropy, "entropy_triton", query)(query, key)
    return entropy_definition.last_row_entropy(query, key)


row_entropy: Any = _register(
    "last_row_entropy",
    "(Tensor query, Tensor key, Tensor? starts=None, Tensor? last=None, int minimum=2) -> Tensor",
    _entropy,
)


@_fake(row_entropy)
def _(query: Tensor, key: Tensor, starts: Any = None, *rest: Any) -> Tensor:
    heads = query.shape[2]
    return query.new_empty(heads if starts is None else (2, heads), dtype=torch.float32)


def last_row_entropy(query: Tensor, key: Tensor, documents: Documents | None = None, minimum: int = 2) -> Tensor:
    """``entropy.last_row_entropy`` as an operator."""
    if documents is None:
        return row_entropy(query, key)
    return row_entropy(query, key, documents.starts, documents.last, minimum)
