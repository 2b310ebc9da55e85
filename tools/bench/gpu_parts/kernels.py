"""Times of one loop pass, of its attention and of the entropies, beside the roofline measured in the same run."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gpu_parts.loop_pass import PassInputs, attention_flops, eager_pass, fused_pass, pass_inputs, work
from gpu_parts.machine import Machine, first_line, per
from megatron_sgt.ops import fused_loop, library
from megatron_sgt.ops.attention import causal_attention
from megatron_sgt.ops.entropy import last_row_entropy

Forward = Callable[[], Tensor]


def shapes(machine: Machine) -> list[tuple[int, int, int, int]]:
    """(T, B, D, d), the shapes of interest first in case time runs out."""
    if machine.dry:
        return [(40, 2, 64, 16)]
    sizes = [(2048, 128), (1024, 64), (4096, 128), (2048, 64), (1024, 128), (4096, 64)]
    return [(4096, batch, width, size) for (width, size), batch in itertools.product(sizes, (1, 2, 4, 8))]


def _both_ways(forward: Forward, leaves: list[Tensor]) -> Callable[[], object]:
    pull = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, pull)


def passes(machine: Machine) -> Iterator[dict[str, Any]]:
    """Forward and backward of a whole pass, in every way."""
    for length, batch, width, size in shapes(machine):
        if machine.late:
            yield {"skipped": f"B {batch}, D {width}, d {size}: the time is used up"}
            continue
        p = pass_inputs(length, batch, width, size, machine.device, machine.dtype)
        operations, least_bytes = work(length, batch, width, size)
        row: dict[str, Any] = {"B": batch, "D": width, "d": size, "T": length}
        for way, forward in _ways(p, machine).items():
            try:
                seconds = machine.seconds(_both_ways(forward, p.leaves()))
            except torch.OutOfMemoryError as error:
                yield {"skipped": f"{way}, B {batch}, D {width}, d {size}: {first_line(error)}"}
                machine.free()
                continue
            row[f"{way}_us"] = per(1e6, seconds)
            row[f"{way}_share"] = round(machine.ideal_seconds(operations, least_bytes) / seconds, 3)
        yield row
        machine.free()


def _ways(p: PassInputs, machine: Machine) -> dict[str, Forward]:
    ways: dict[str, Forward] = {
        "fused_custom": lambda: fused_pass(p, library=False),
        "fused_library": lambda: fused_pass(p, library=True),
        "eager": lambda: eager_pass(p),
    }
    # Compiling takes seconds: at two sequences, and at all batch sizes of the shape of interest.
    if p.x.shape[1] == 2 or p.x.shape[2] == 2048 or machine.dry:
        torch._dynamo.reset()
        backend = "aot_eager" if machine.dry else "inductor"
        compiled = torch.compile(eager_pass, backend=backend)
        ways["compiled"] = lambda: compiled(p)
    return ways


def attentions(machine: Machine) -> Iterator[dict[str, Any]]:
    """The attention alone, custom and library: what the dispatch table in ops/backend.py should say."""
    for length, batch, size in sorted({(t, b, d) for t, b, _, d in shapes(machine)}):
        if machine.late:
            yield {"skipped": f"attention, B {batch}, d {size}: the time is used up"}
            continue
        p = pass_inputs(length, batch, 2 * size, size, machine.device, machine.dtype)
        query, key, value = (
            torch.randn_like(p.x).unflatten(-1, (2, size)).requires_grad_() for _ in range(3)
        )
        ways: dict[str, Forward] = {
            "custom": partial(_custom, p.at, False, query, key, value),
            "custom_entropy": partial(_custom, p.at, True, query, key, value),
            "custom_whole_keys": partial(_custom, p.at, False, query, key, value),
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
    fused = torch.randn(shape, device=machine.device).to(machine.dtype)
    query, key, _ = fused.chunk(3, dim=2)
    yield {
        "T": length,
        "B": batch,
        "heads": width // size,
        "d": size,
        "kernel_us": per(1e6, machine.seconds(lambda: library.last_row_entropy(query, key))),
        "torch_us": per(1e6, machine.seconds(lambda: last_row_entropy(query, key))),
    }
