"""Each operation of a loop pass alone, beside the same in library calls, and the rotary positions of a whole layer.

``share``: of the roofline, the larger of operations over the measured matmul ceiling and bytes over that of copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts.kernels import length_of, shape_of
from gpu_parts.loop_pass import EPS, PassInputs, eager_rotate, pass_inputs
from gpu_parts.machine import Machine, per
from megatron_sgt.ops import fused_loop, operators
from megatron_sgt.ops.rotary import Rotary, rotate_heads


@dataclass(frozen=True)
class Operation:
    """``kernel`` and ``eager`` compute the same; ``flops`` and ``bytes`` are the least that it takes."""

    name: str
    kernel: Callable[[], Any]
    eager: Callable[[], Any]
    flops: float
    bytes: float


def operations(p: PassInputs) -> Iterator[Operation]:
    """Everything that a pass consists of but its attention, on tensors that need no gradients."""
    x, norm, weight, _ = (t.detach() for t in p.leaves())
    at, cos, sin = p.blocks, p.rotary.cos, p.rotary.sin
    arguments = (x, norm, weight, None, at.rows, cos, sin, None, None, EPS, at.heads)
    qkv, r, before = operators.project_in(*arguments)
    heads = tuple(t.contiguous() for t in qkv.chunk(3, dim=2))
    yield from _forward(p, arguments, heads[0])
    dout = torch.randn_like(x)
    arguments = (*heads, qkv, before, r, None, at.rows, cos, sin, None, None, EPS, x.shape[-1])
    scaled, coefficient, _ = operators.head_gradients(*arguments)
    yield from _backward(p, arguments, dout, scaled, coefficient)
    yield _weight_gradients(p, dout, heads[0], scaled)


def _sizes(p: PassInputs) -> tuple[float, float, float]:
    """Operations of a product with one head block per kept head; bytes of [S, B, D] and of all kept q, k and v."""
    tokens, width = p.x.shape[0] * p.x.shape[1], p.x.shape[-1]
    element, rows = p.x.element_size(), 3 * p.blocks.heads * p.size
    return 2.0 * tokens * width * rows / 3, tokens * width * element, tokens * rows * element


def _forward(p: PassInputs, arguments: tuple[Any, ...], query: Tensor) -> Iterator[Operation]:
    x, norm, weight, out_weight = (t.detach() for t in p.leaves())
    heads = p.blocks.heads
    product, stream, some = _sizes(p)

    def eager_in() -> Tensor:
        fused = F.linear(F.rms_norm(x, norm.shape, norm, EPS), weight[p.blocks.row_index])
        q, k, v = fused.unflatten(-1, (3 * heads, p.size)).split([heads, heads, heads], dim=2)
        return torch.cat([eager_rotate(q, p.rotary), eager_rotate(k, p.rotary), v], dim=2)

    def eager_out() -> Tensor:
        return x + F.linear(query.flatten(2), out_weight[:, p.blocks.column_index])

    yield Operation("project_in", lambda: operators.project_in(*arguments), eager_in, 3 * product, stream + some)
    kernel = partial(operators.project_out, query, x, out_weight, p.blocks.columns)
    yield Operation("project_out", kernel, eager_out, product, 2 * stream + some / 3)


def _backward(
    p: PassInputs, arguments: tuple[Any, ...], dout: Tensor, scaled: Tensor, coefficient: Tensor
) -> Iterator[Operation]:
    x, norm, weight, out_weight = (t.detach() for t in p.leaves())
    at, back = p.blocks, Rotary(p.rotary.cos, -p.rotary.sin)
    product, stream, some = _sizes(p)
    dq, dk, dv, _, _, r = arguments[:6]
    unscaled = (scaled / r.to(scaled)[..., None, None]).flatten(2)
    grown = x.clone().requires_grad_()
    normed = F.rms_norm(grown, norm.shape, norm, EPS)

    def eager_heads() -> Tensor:
        heads = torch.cat([eager_rotate(dq, back), eager_rotate(dk, back), dv], dim=2)
        return heads * r.to(heads)[..., None, None]

    def eager_input() -> Tensor:
        dnormed = unscaled @ weight[p.blocks.row_index]
        return torch.autograd.grad(normed, grown, dnormed, retain_graph=True)[0] + dout

    kernel = partial(operators.output_gradient, dout, out_weight, at.columns, p.size)
    yield Operation(
        "output_gradient",
        kernel,
        lambda: dout @ out_weight[:, p.blocks.column_index],
        product,
        stream + some / 3,
    )
    yield Operation("head_gradients", partial(operators.head_gradients, *arguments), eager_heads, 0.0, 3 * some)
    kernel = partial(operators.input_gradient, scaled, coefficient, x, dout, norm, weight, at.rows)
    yield Operation("input_gradient", kernel, eager_input, 3 * product, 3 * stream + some)


def _weight_gradients(p: PassInputs, dout: Tensor, heads: Tensor, scaled: Tensor) -> Operation:
    """Products, and what a dense gradient of the whole weights costs on top (``kernel``: into main_grad's rows)."""
    x, norm, weight, out_weight = (t.detach() for t in p.leaves())
    buffered, out_buffered = (t.clone() for t in (weight, out_weight))
    for parameter in (buffered, out_buffered):
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]

    def both(first: Tensor, second: Tensor) -> None:
        product = fused_loop.weight_product(scaled.flatten(0, 1).flatten(1), x.flatten(0, 1), torch.float32)
        fused_loop.qkv_gradient(product, norm, first, p.blocks)
        wide = getattr(second, "main_grad", second).dtype
        product = fused_loop.weight_product(dout.flatten(0, 1), heads.flatten(0, 1).flatten(1), wide)
        fused_loop.into_parameter(second, product, p.blocks.column_index, p.blocks, 1)

    tokens, width, rows = x.shape[0] * x.shape[1], x.shape[-1], len(p.blocks.row_index)
    flops = 2.0 * tokens * width * (rows + len(p.blocks.column_index))
    return Operation(
        "weight gradients: main_grad (kernel), dense (eager)",
        lambda: both(buffered, out_buffered),
        lambda: both(weight, out_weight),
        flops,
        x.element_size() * tokens * (2 * width + rows + len(p.blocks.column_index)),
    )


def rotary(p: PassInputs, width: int) -> Operation:
    """Queries and keys of all heads, forward and backward."""
    length, batch, _ = p.x.shape
    fused = torch.randn(length, batch, width // p.size, 3 * p.size, device=p.x.device).to(p.x.dtype)
    query, key = (fused[..., n * p.size : (n + 1) * p.size].detach().requires_grad_() for n in range(2))
    pull = [torch.ones_like(t) for t in (query, key)]

    def back(turned: Any) -> Any:
        return torch.autograd.grad(list(turned), [query, key], pull)

    return Operation(
        "rotary, all heads, both directions",
        lambda: back(rotate_heads(query, key, p.rotary)),
        lambda: back([eager_rotate(t, p.rotary) for t in (query, key)]),
        0.0,
        8.0 * query.numel() * query.element_size(),
    )


def rows(machine: Machine, wanted: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Every operation at one shape, on inputs that are not in the level-2 cache: copies that are used in turn."""
    length, shape = length_of(machine), shape_of(machine, wanted)
    batch, width, size = shape["batch"], shape["width"], shape["size"]
    count = machine.copies(length * batch * width * machine.dtype.itemsize)
    torch._dynamo.reset()  # code for this shape, not for any
    buffers = []
    for _ in range(count):
        p = pass_inputs(length, batch, width, size, machine.device, machine.dtype)
        # A warm machine has no numbers to rotate and nothing of Triton's to compile for it.
        buffers.append([*operations(p), *(() if machine.warm else [rotary(p, width)])])
    for turns in zip(*buffers, strict=True):
        row: dict[str, Any] = {"operation": turns[0].name, "B": batch, "D": width, "d": size}
        kernel = machine.seconds([o.kernel for o in turns])
        eager = 1.0 if machine.warm else machine.seconds([o.eager for o in turns])
        row |= {"kernel_us": per(1e6, kernel), "eager_us": per(1e6, eager)}
        row["share"] = round(machine.ideal_seconds(turns[0].flops, turns[0].bytes) / kernel, 3)
        yield row
