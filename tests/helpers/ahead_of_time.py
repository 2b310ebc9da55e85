"""Compiles a Triton kernel for a GPU that is not there, and reads what the assembler made of it.

python -m tests.helpers.ahead_of_time        # the table: registers, stack, shared memory, tensor-core instructions
"""

import importlib
import itertools
import pathlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from megatron_sgt.ops.tiles import entry

_FP32 = {"cos_ptr", "sin_ptr", "r_ptr", "coefficient_ptr", "dnorm_ptr", "gates_ptr", "lse_ptr", "entropy_ptr",
         "part_acc_ptr", "part_sums_ptr", "delta_ptr", "sums_ptr"}  # fmt: skip
_INT32 = {"rows_ptr", "columns_ptr", "slots_ptr"}
_SCALAR_FP32 = {"eps", "scale", "unit", "norm"}
_ODD = {"batch", "heads", "groups", "count", "parts", "repeat"}  # small numbers: nothing is known of them


@dataclass(frozen=True)
class Kernel:
    """One kernel: its module, its entry in the table of tiles ("" if it has none) and its switches."""

    module: str
    name: str
    tiles: str
    switches: dict[str, Any]
    tensor_cores: bool = True


_IN, _BACK = "loop_projection_triton", "loop_projection_backward_triton"
_ATTEND, _ATTEND_BACK = "loop_attention_triton", "loop_attention_backward_triton"
_PLAIN = {"HAS_BIAS": False, "HAS_NORM": False}
_FULL = {"HAS_BIAS": True, "HAS_NORM": True}
KERNELS = {
    "project_in": Kernel(_IN, "project_in_kernel", "project_in", {**_PLAIN, "EVEN": True}),
    "project_in, all": Kernel(_IN, "project_in_kernel", "project_in", {**_FULL, "EVEN": True}),
    "project_out": Kernel(_IN, "project_out_kernel", "project_out", {"HAS_RESIDUAL": True}),
    "output_gradient": Kernel(_BACK, "output_gradient_kernel", "output_gradient", {"EVEN": True}),
    "head_gradients": Kernel(_BACK, "head_gradients_kernel", "head_gradients", _PLAIN, False),
    "head_gradients, all": Kernel(_BACK, "head_gradients_kernel", "head_gradients", _FULL, False),
    "input_gradient": Kernel(_BACK, "input_gradient_kernel", "input_gradient", {"HAS_RESIDUAL": True}),
    "attend": Kernel(_ATTEND, "attend_kernel", "attend", {"ENTROPY": False, "SPLIT": False}),
    "attend, entropy": Kernel(_ATTEND, "attend_kernel", "attend", {"ENTROPY": True, "SPLIT": False}),
    "attend, split": Kernel(_ATTEND, "attend_kernel", "attend", {"ENTROPY": False, "SPLIT": True}),
    "attend, split, entropy": Kernel(_ATTEND, "attend_kernel", "attend", {"ENTROPY": True, "SPLIT": True}),
    "merge": Kernel(_ATTEND, "merge_kernel", "", {"ENTROPY": True, "BM": 64}, False),
    "delta": Kernel(_ATTEND_BACK, "delta_kernel", "", {"BM": 64}, False),
    "attend_backward": Kernel(_ATTEND_BACK, "attend_backward_kernel", "attend_backward", {}),
    "entropy, parts": Kernel("entropy_triton", "part_kernel", "", {"BN": 64}, False),
    "entropy, merge": Kernel("entropy_triton", "merge_kernel", "", {"BLOCK": 64}, False),
}
HEAD_SIZES = (64, 128)
ARCHITECTURES = (80, 90)


def compile_kernel(kernel: Kernel, arch: int, size: int, dtype: str = "bf16") -> dict[str, int]:
    """REG, STACK (bytes), smem (bytes) and counts of instructions of ``kernel`` for tensors of ``dtype``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"megatron_sgt.ops.{kernel.module}"), kernel.name)
    shape, launch = (
        entry(kernel.tiles, arch, size, dtype == "fp32") if kernel.tiles else ({}, {"num_warps": 4})
    )
    known = {
        **kernel.switches,
        **shape,
        "H": size,
        "BH": size,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }
    names = function.arg_names
    constants = {name: known[name] for name in names if name in known}
    signature = {name: "constexpr" if name in constants else _type_of(name, dtype) for name in names}
    round_numbers = [n for n in names if n not in constants and n not in _SCALAR_FP32 and n not in _ODD]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in round_numbers}
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)
    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [tools / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "HMMA", "STL")}
    return {**found, "smem": compiled.metadata.shared, **counts}


def _type_of(name: str, dtype: str) -> str:
    if name.endswith("_ptr"):
        return "*fp32" if name in _FP32 else "*i32" if name in _INT32 else f"*{dtype}"
    return "fp32" if name in _SCALAR_FP32 else "i32"


def main(pattern: str = "") -> None:
    """Print everything that is shipped (or what has ``pattern`` in its name), line by line."""
    for (name, kernel), size, arch in itertools.product(KERNELS.items(), HEAD_SIZES, ARCHITECTURES):
        if pattern in name:
            numbers = compile_kernel(kernel, arch, size)
            shown = "  ".join(f"{key} {value}" for key, value in numbers.items())
            print(f"{name:24} sm_{arch} d{size:<4} {shown}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
