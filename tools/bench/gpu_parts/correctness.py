"""Right on this device: tolerances in each type, the same bits twice, CUDA graphs, the golden trajectory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_parts.loop_pass import PassInputs, eager_pass, fused_pass, pass_inputs
from gpu_parts.machine import ROOT, Machine, first_line

# Relative to the largest value, against the same pass in fp32 (bf16 keeps 8 bits, fp16 11).
TOLERANCES = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}


def results(p: PassInputs, way: str) -> list[Tensor]:
    """Output and gradients of one pass."""
    out = eager_pass(p) if way == "eager" else fused_pass(p, way == "library")
    return [out.detach(), *torch.autograd.grad(out, p.leaves(), torch.ones_like(out))]


def _in_fp32(p: PassInputs) -> PassInputs:
    wide = {
        n: getattr(p, n).detach().float().requires_grad_()
        for n in ("x", "norm_weight", "qkv_weight", "out_weight")
    }
    return PassInputs(**{**p.__dict__, **wide})


def tolerance(machine: Machine, dtype: torch.dtype, way: str) -> dict[str, Any]:
    """Largest relative error of outputs and gradients against the eager pass in fp32.

    "split": the custom attention on one sequence that is long enough for its sums to be split in both directions.
    """
    length, width, size = (40, 64, 16) if machine.dry else (1024, 1024, 128)
    if way == "split":
        length = 161 if machine.dry else 3001
    p = pass_inputs(length, 1 if way == "split" else 2, width, size, machine.device, dtype)
    wanted, found = results(_in_fp32(p), "eager"), results(p, way)
    errors = [
        float((a.float() - b).abs().max() / b.abs().max().clamp(min=1e-6))
        for a, b in zip(found, wanted, strict=True)
    ]
    worst = max(errors)
    return {
        "check": f"{way} pass in {dtype}",
        "passed": worst <= TOLERANCES[dtype],
        "detail": f"error {worst:.1e}",
    }


def determinism(machine: Machine) -> dict[str, Any]:
    """Two runs of the fused pass give the same bits, gradients included."""
    length, width, size = (40, 64, 16) if machine.dry else (4096, 2048, 128)
    p = pass_inputs(length, 1, width, size, machine.device, machine.dtype)
    same = all(torch.equal(a, b) for a, b in zip(results(p, "custom"), results(p, "custom"), strict=True))
    return {"check": "two runs, the same bits", "passed": same, "detail": ""}


def graph_capture(machine: Machine) -> dict[str, Any]:
    """The fused pass, captured once and replayed on new inputs and gates, equals the pass outside of the graph."""
    name = "CUDA graph"
    if machine.dry:
        return {"check": name, "passed": None, "detail": "needs a GPU"}
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
        p.at.gates.fill_(0.25)
    graph.replay()
    wanted = results(p, "custom")
    same = all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
    return {"check": name, "passed": same, "detail": "a decayed gate needs no new graph"}


def golden(machine: Machine) -> dict[str, Any]:
    """The authors' recorded run in fp32, in a process of its own, for at most a third of the time that is left."""
    name = "golden trajectory a, fp32"
    limit = max(1.0, (machine.deadline - time.monotonic()) / 3)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "tools/replay_trajectory.py",
            "tests/golden/a.safetensors",
            "--out",
            str(Path(folder, "replay.safetensors")),
            "--compare",
            "--device",
            machine.device.type,
        ]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            return {
                "check": name,
                "passed": None,
                "detail": f"not finished in {limit:.0f} s",
            }
    lines = [line for line in done.stdout.splitlines() if "difference" in line]
    detail = "; ".join(" ".join(line.replace("max |difference|", "").split()) for line in lines)
    return {"check": name, "passed": done.returncode == 0, "detail": detail}


def run(machine: Machine, with_golden: bool = True) -> Iterator[dict[str, Any]]:
    """All checks, one after the other; one that raises has failed. A dry run has no bf16: the interpreter has none."""
    types = [torch.float32, torch.float16, *([] if machine.dry else [torch.bfloat16])]
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        f"{way} pass in {dtype}": partial(tolerance, machine, dtype, way)
        for dtype in types
        for way in ("custom", "split", "library")
    }
    checks |= {"two runs": partial(determinism, machine), "CUDA graph": partial(graph_capture, machine)}
    if with_golden:
        checks["golden trajectory"] = partial(golden, machine)
    for name, check in checks.items():
        try:
            yield check()
        except Exception as error:
            yield {"check": name, "passed": False, "detail": first_line(error)}
