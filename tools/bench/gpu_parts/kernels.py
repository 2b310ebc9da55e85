"""Times of one loop pass, of its attention and of the entropies, beside the roofline measured in the same run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gpu_parts.loop_pass import PassInputs, attention_flops, eager_pass, fused_pass, pass_inputs, work
from gpu_parts.machine import Machine, first_line, per
from megatron_sgt.ops import fused_loop, operators
from megatron_sgt.ops.attention import causal_attention
from megatron_sgt.ops.entropy import last_row_entropy

Forward = Callable[[], Tensor]


def length_of(machine: Machine) -> int:
    """Tokens of a sequence."""
    return 40 if machine.dry else 4096


def shape_of(machine: Machine, wanted: dict[str, int]) -> dict[str, int]:
    """The row's shape; a dry run's is tiny."""
    tiny = {"width": 64, "size": 16, "batch": min(2, wanted["batch"])}
    return {name: tiny[name] if machine.dry else value for name, value in wanted.items()}


def _both_ways(forward: Forward, leaves: list[Tensor]) -> Callable[[], object]:
    pull = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, pull)


def passes(machine: Machine, wanted: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Forward and backward of a whole pass, in every way, on inputs that are not in the level-2 cache."""
    length, shape = length_of(machine), shape_of(machine, wanted)
    batch, width, size = shape["batch"], shape["width"], shape["size"]
    count = machine.copies(length * batch * width * machine.dtype.itemsize)
    inputs = [pass_inputs(length, batch, width, size, machine.device, machine.dtype) for _ in range(count)]
    operations, least_bytes = work(length, batch, width, size)
    row: dict[str, Any] = {"B": batch, "D": width, "d": size, "T": length}
    for way, forward in _ways(machine).items():
        try:
            seconds = machine.seconds([_both_ways(partial(forward, p), p.leaves()) for p in inputs])
        except torch.OutOfMemoryError as error:
            yield {"skipped": f"{way}, B {batch}, D {width}, d {size}: {first_line(error)}"}
            machine.free()
            continue
        row[f"{way}_us"] = per(1e6, seconds)
        row[f"{way}_share"] = round(machine.ideal_seconds(operations, least_bytes) / seconds, 3)
    yield row


def _ways(machine: Machine) -> dict[str, Callable[[PassInputs], Tensor]]:
    ways: dict[str, Callable[[PassInputs], Tensor]] = {
        "fused_custom": partial(fused_pass, library=False),
        "fused_library": partial(fused_pass, library=True),
    }
    if machine.warm:
        return ways
    torch._dynamo.reset()
    compiled = torch.compile(eager_pass, backend="aot_eager" if machine.dry else "inductor")
    return ways | {"eager": eager_pass, "compiled": compiled}


def attention(machine: Machine, wanted: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The attention alone, custom and library: what the dispatch table in ops/backend.py should say."""
    length, shape = length_of(machine), shape_of(machine, wanted)
    batch, size = shape["batch"], shape["size"]
    p = pass_inputs(length, batch, 2 * size, size, machine.device, machine.dtype)
    query, key, value = (torch.randn_like(p.x).unflatten(-1, (2, size)).requires_grad_() for _ in range(3))
    ways: dict[str, Forward] = {
        "custom": partial(_custom, p.blocks, False, query, key, value),
        "custom_entropy": partial(_custom, p.blocks, True, query, key, value),
        "custom_whole_keys": partial(_custom, p.blocks, False, query, key, value),
        "library": partial(causal_attention, query, key, value),
    }
    row: dict[str, Any] = {"B": batch, "d": size, "T": length}
    for way, forward in ways.items():
        with _whole_keys() if way == "custom_whole_keys" else contextlib.nullcontext():
            with torch.no_grad():
                ahead = machine.seconds(forward)
            total = machine.seconds(_both_ways(forward, [query, key, value]))
        row[f"{way}_forward_us"], row[f"{way}_us"] = per(1e6, ahead), per(1e6, total)
        ideal = attention_flops(length, batch, size) / machine.matmul_flops_per_second
        row[f"{way}_forward_share"] = round(ideal / ahead, 3)
        row[f"{way}_share"] = round(3.5 * ideal / total, 3)
    yield row


def _custom(at: Any, measure_entropy: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return fused_loop.attend(query, key, value, at, measure_entropy)[0]


@contextlib.contextmanager
def _whole_keys() -> Iterator[None]:
    """Never split the keys, in either direction: what splitting gains where it happens."""
    from megatron_sgt.ops import loop_attention_backward_triton, loop_attention_triton

    with contextlib.ExitStack() as stack:
        for module in (loop_attention_triton, loop_attention_backward_triton):
            stack.enter_context(mock.patch.object(module, "split_keys", lambda x, keys, *_: keys))
        yield


def entropies(machine: Machine) -> Iterator[dict[str, Any]]:
    """The entropies of all heads of a layer in a step that measures them."""
    length, batch, width, size = (40, 2, 64, 16) if machine.dry else (4096, 2, 2048, 128)
    shape = (length, batch, 3 * width // size, size)
    count = machine.copies(length * batch * width * machine.dtype.itemsize)
    fused = [torch.randn(shape, device=machine.device).to(machine.dtype).chunk(3, dim=2) for _ in range(count)]
    yield {
        "T": length,
        "B": batch,
        "heads": width // size,
        "d": size,
        "kernel_us": per(1e6, machine.seconds([partial(operators.last_row_entropy, *f[:2]) for f in fused])),
        "torch_us": per(1e6, machine.seconds([partial(last_row_entropy, *f[:2]) for f in fused])),
    }
