"""Right on this device: tolerances in each type, the same bits twice, CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpu_parts.loop_pass import PassInputs, eager_pass, fused_pass, pass_inputs
from gpu_parts.machine import Machine

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Relative to the largest value, against the same pass in fp32 (bf16 keeps 8 bits, fp16 11).
TOLERANCES = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}


def results(p: PassInputs, way: str) -> list[Tensor]:
    """Output and gradients of one pass."""
    out = eager_pass(p) if way == "eager" else fused_pass(p, way == "library")
    return [out.detach(), *torch.autograd.grad(out, p.leaves(), torch.ones_like(out))]


def largest_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Relative to the largest value of each tensor; infinite where something is not finite."""
    errors = [
        float((a.float() - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in zip(found, wanted, strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)


def _in_fp32(p: PassInputs) -> PassInputs:
    wide = {
        n: getattr(p, n).detach().float().requires_grad_() for n in ("x", "norm_weight", "qkv_weight", "out_weight")
    }
    return PassInputs(**{**p.__dict__, **wide})


def tolerance(machine: Machine, dtype: str, way: str) -> Iterator[dict[str, Any]]:
    """Largest relative error of outputs and gradients against the eager pass in fp32.

    "split": the custom attention on one sequence that is long enough for its sums to be split in both directions.
    A dry run has no bf16 and takes fp32: Triton's interpreter has none.
    """
    kind = torch.float32 if machine.dry and dtype == "bf16" else TYPES[dtype]
    length, width, size = (40, 64, 16) if machine.dry else (1024, 1024, 128)
    if way == "split":
        length = 161 if machine.dry else 3001
    p = pass_inputs(length, 1 if way == "split" else 2, width, size, machine.device, kind)
    worst = largest_error(results(p, way), results(_in_fp32(p), "eager"))
    yield {
        "check": f"{way} pass, {dtype}",
        "passed": worst <= TOLERANCES[kind],
        "detail": f"error {worst:.1e}",
    }


def determinism(machine: Machine) -> Iterator[dict[str, Any]]:
    """Two runs of the fused pass give the same bits, gradients included."""
    length, width, size = (40, 64, 16) if machine.dry else (4096, 2048, 128)
    p = pass_inputs(length, 1, width, size, machine.device, machine.dtype)
    same = all(torch.equal(a, b) for a, b in zip(results(p, "custom"), results(p, "custom"), strict=True))
    yield {"check": "two runs, the same bits", "passed": same, "detail": ""}


def graph_capture(machine: Machine) -> Iterator[dict[str, Any]]:
    """The fused pass, captured once and replayed on new inputs and gates, equals the pass outside of the graph."""
    name = "CUDA graph"
    if machine.dry:
        yield {"check": name, "passed": None, "detail": "needs a GPU"}
        return
    p = pass_inputs(1024, 1, 1024, 128, machine.device, machine.dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(p, "custom")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(p, "custom")
    with torch.no_grad():
        p.x.mul_(0.5)
        p.blocks.gates.fill_(0.25)
    graph.replay()
    wanted = results(p, "custom")
    same = all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
    yield {"check": name, "passed": same, "detail": "a decayed gate needs no new graph"}
