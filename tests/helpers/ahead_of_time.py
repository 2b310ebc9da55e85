"""Compiles a Triton kernel for a GPU that is not there, and reads what the assembler made of it.

python -m tests.helpers.ahead_of_time                  # the table: registers, stack, shared memory, instructions
python -m tests.helpers.ahead_of_time attend_backward sm_100 bf16 128
python -m tests.helpers.ahead_of_time --table          # the table of docs/kernels.md
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

from megatron_sgt.ops.tiles import AMD, entry

_FP32 = {"cos_ptr", "sin_ptr", "r_ptr", "coefficient_ptr", "dnorm_ptr", "gates_ptr", "lse_ptr", "entropy_ptr",
         "part_acc_ptr", "part_sums_ptr", "delta_ptr", "sums_ptr", "part_q_ptr", "part_k_ptr",
         "part_v_ptr", "product_ptr", "part_ptr"}  # fmt: skip
_INT32 = {"rows_ptr", "columns_ptr", "slots_ptr", "starts_ptr", "ends_ptr", "last_ptr"}
_SCALAR_FP32 = {"eps", "scale", "unit", "norm"}
_ODD = {"batch", "heads", "groups", "count", "parts", "repeat"}  # small numbers: nothing is known of them


@dataclass(frozen=True)
class Kernel:
    """One kernel: its module, its entry in the table of tiles ("" if it has none), its switches and its products."""

    module: str
    name: str
    tiles: str
    switches: dict[str, Any]
    tensor_cores: bool = True
    warps: int = 4


@dataclass(frozen=True)
class Target:
    """A GPU: its number in the table of tiles, shared memory of one program in bytes, its matrix instruction.

    Shared memory: CUDA programming guide, "Technical Specifications per Compute Capability" (sm_80 has 163 KiB, but
    sm_86 and sm_89, which have 99, run the same tiles); for gfx942 the 64 KiB of local data share of AMD's "CDNA 3
    ISA" reference.
    """

    arch: int
    shared_memory: int
    instruction: str


TARGETS = {
    "sm_80": Target(80, 99 * 1024, "HMMA"),
    "sm_90": Target(90, 227 * 1024, "HGMMA"),
    "sm_100": Target(100, 227 * 1024, "UTCHMMA"),
    "sm_120": Target(120, 99 * 1024, "HMMA"),
    "gfx942": Target(AMD, 64 * 1024, "v_mfma"),
}
HEAD_SIZES = (64, 128)

_IN, _BACK = "loop_projection_triton", "loop_projection_backward_triton"
_ATTEND, _ATTEND_BACK = "loop_attention_triton", "loop_attention_backward_triton"
_SUMS, _ENTROPY = "loop_attention_sums_triton", "entropy_triton"
_PLAIN = {"HAS_BIAS": False, "HAS_NORM": False}
_FULL = {"HAS_BIAS": True, "HAS_NORM": True}
_RESIDUAL = {"HAS_RESIDUAL": True}
_DOCUMENTS = {"DOCUMENTS": True}
KERNELS = {
    "project_in": Kernel(_IN, "project_in_kernel", "project_in", {**_PLAIN, "EVEN": True}),
    "project_in, all": Kernel(_IN, "project_in_kernel", "project_in", {**_FULL, "EVEN": True}),
    "project_in, uneven": Kernel(_IN, "project_in_kernel", "project_in", {**_FULL, "EVEN": False}),
    "project_out": Kernel(_IN, "project_out_kernel", "project_out", _RESIDUAL),
    "project_out, alone": Kernel(_IN, "project_out_kernel", "project_out", {"HAS_RESIDUAL": False}),
    "output_gradient": Kernel(_BACK, "output_gradient_kernel", "output_gradient", {"EVEN": True}),
    "output_gradient, uneven": Kernel(_BACK, "output_gradient_kernel", "output_gradient", {"EVEN": False}),
    "head_gradients": Kernel(_BACK, "head_gradients_kernel", "head_gradients", _PLAIN, False),
    "head_gradients, all": Kernel(_BACK, "head_gradients_kernel", "head_gradients", _FULL, False),
    "norm_weight_gradient": Kernel(_BACK, "norm_weight_gradient_kernel", "", {"ADD": False, "BN": 32}, False),
    "norm_weight_gradient, added": Kernel(_BACK, "norm_weight_gradient_kernel", "", {"ADD": True, "BN": 32}, False),
    "input_gradient": Kernel(_BACK, "input_gradient_kernel", "input_gradient", _RESIDUAL),
    "input_gradient, alone": Kernel(_BACK, "input_gradient_kernel", "input_gradient", {"HAS_RESIDUAL": False}),
    "attend": Kernel(_ATTEND, "attend_kernel", "attend", {"ENTROPY": False, "SPLIT": False}),
    "attend, entropy": Kernel(_ATTEND, "attend_kernel", "attend", {"ENTROPY": True, "SPLIT": False}),
    "attend, split": Kernel(_ATTEND, "attend_kernel", "attend", {"ENTROPY": False, "SPLIT": True}),
    "attend, split, entropy": Kernel(_ATTEND, "attend_kernel", "attend", {"ENTROPY": True, "SPLIT": True}),
    "attend, documents": Kernel(_ATTEND, "attend_kernel", "attend", {"ENTROPY": False, "SPLIT": False, **_DOCUMENTS}),
    "attend, split, entropy, documents": Kernel(
        _ATTEND, "attend_kernel", "attend", {"ENTROPY": True, "SPLIT": True, **_DOCUMENTS}
    ),
    "merge": Kernel(_ATTEND, "merge_kernel", "", {"ENTROPY": True, "BM": 64}, False),
    "delta": Kernel(_SUMS, "delta_kernel", "", {"BM": 64}, False),
    "attend_backward": Kernel(_ATTEND_BACK, "attend_backward_kernel", "attend_backward", {"SPLIT": False}),
    "attend_backward, split": Kernel(_ATTEND_BACK, "attend_backward_kernel", "attend_backward", {"SPLIT": True}),
    "attend_backward, documents": Kernel(
        _ATTEND_BACK, "attend_backward_kernel", "attend_backward", {"SPLIT": False, **_DOCUMENTS}
    ),
    "attend_backward, split, documents": Kernel(
        _ATTEND_BACK, "attend_backward_kernel", "attend_backward", {"SPLIT": True, **_DOCUMENTS}
    ),
    "sum_parts": Kernel(_SUMS, "sum_parts_kernel", "", {"BM": 64, "BN": 64}, False),
    "entropy, parts": Kernel(_ENTROPY, "part_kernel", "", {"BN": 64}, False),
    "entropy, merge": Kernel(_ENTROPY, "merge_kernel", "", {"BLOCK": 64}, False, warps=1),
    "entropy, parts, documents": Kernel(_ENTROPY, "part_kernel", "", {"BN": 64, **_DOCUMENTS}, False),
}


def compile_kernel(name: str, target: str, size: int, dtype: str = "bf16", **values: int) -> dict[str, int]:
    """registers of a thread, stack and shared memory in bytes, and the number of matrix instructions.

    ``other_products``: products of matrices that the compiler left to an older instruction than the target's (on
    sm_90 and sm_100: not wgmma, not tcgen05). ``values``: arguments that are constants of the program.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, device = KERNELS[name], TARGETS[target]
    function = getattr(importlib.import_module(f"megatron_sgt.ops.{kernel.module}"), kernel.name)
    shape, launch = (
        entry(kernel.tiles, device.arch, size, dtype == "fp32") if kernel.tiles else ({}, {"num_warps": kernel.warps})
    )
    precision = "ieee" if dtype == "fp32" else "tf32"
    known = {"DOCUMENTS": False, **kernel.switches, **values, **shape, "H": size, "BH": size, "PRECISION": precision}
    names = function.arg_names
    constants = {name: known[name] for name in names if name in known}
    types = {name: _type_of(name, dtype, kernel.switches) for name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    round_numbers = [n for n in names if n not in constants and n not in _SCALAR_FP32 and n not in _ODD]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in round_numbers}
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    amd = device.arch == AMD
    where = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", device.arch, 32)
    compiled = triton.compile(source, target=where, options=launch)
    found = _amd_usage(compiled.asm["amdgcn"]) if amd else _nvidia_usage(compiled.asm["cubin"])
    code = found.pop("code")
    newer = device.instruction in ("HGMMA", "UTCHMMA")
    return {
        **found,
        "shared": compiled.metadata.shared,
        "matrix": len(re.findall(rf"\b{device.instruction}", code)),
        "other_products": len(re.findall(r"\btt\.dot ", compiled.asm["ttgir"])) if newer else 0,
    }


def _nvidia_usage(cubin: bytes) -> dict[str, Any]:
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tools / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return {"registers": found["REG"], "stack": found["STACK"], "code": code}


def _amd_usage(code: str) -> dict[str, Any]:
    """The metadata that the assembler notes; ``stack`` is the scratch memory that spilled registers go to."""
    found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\n", code)}
    return {"registers": found["vgpr_count"], "stack": found["private_segment_fixed_size"], "code": code}


def _type_of(name: str, dtype: str, switches: dict[str, Any]) -> str:
    """Parts of the attention's gradients are fp32, and so is the buffer that weight gradients are added to."""
    if name.endswith("_ptr"):
        wide = _FP32 | ({"dq_ptr", "dk_ptr", "dv_ptr"} if switches.get("SPLIT") else set())
        wide |= {"target_ptr"} if switches.get("ADD") else set()
        return "*fp32" if name in wide else "*i32" if name in _INT32 else f"*{dtype}"
    return "fp32" if name in _SCALAR_FP32 else "i32"


def budget(found: dict[str, int]) -> str:
    """Registers of a thread / KiB of shared memory, as documented."""
    return f"{found['registers']} / {-(-found['shared'] // 1024)}"


def table() -> None:
    """Print the table of docs/kernels.md."""
    import triton

    columns = list(itertools.product(("sm_80", "sm_90"), HEAD_SIZES))
    print(f"| bf16, Triton {triton.__version__} | " + " | ".join(f"{t} d{size}" for t, size in columns) + " |")
    print("|" + " --- |" * (1 + len(columns)))
    for name in KERNELS:
        cells = [budget(compile_kernel(name, *column)) for column in columns]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main(pattern: str = "", *chosen: str) -> None:
    """Print everything that is shipped (or what has ``pattern`` in its name), line by line.

    ``chosen``: targets, types and head sizes, in any order; by default sm_80 and sm_90, bf16, 64 and 128.
    """
    if pattern == "--table":
        table()
        return
    targets = [t for t in TARGETS if t in chosen] or ["sm_80", "sm_90"]
    types = [t for t in ("bf16", "fp16", "fp32") if t in chosen] or ["bf16"]
    sizes = [int(c) for c in chosen if c.isdigit()] or HEAD_SIZES
    for name, target, dtype, size in itertools.product(KERNELS, targets, types, sizes):
        if pattern in name:
            numbers = compile_kernel(name, target, size, dtype)
            shown = "  ".join(f"{key} {value}" for key, value in numbers.items())
            print(f"{name:24} {target:6} {dtype} d{size:<4} {shown}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
