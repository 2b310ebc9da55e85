"""Every shipped kernel compiles for the GPUs that it is shipped for, without spilling, within their limits.

No GPU is needed: the assemblers come with Triton. ``python -m tests.helpers.ahead_of_time`` prints the numbers.
sm_90 runs whole, sm_80 without documents; of the other GPUs a share that holds the largest variant of every tile, and
`make test-all` runs all of it, with fp16, fp32 and small heads.
"""

import itertools
import re
from itertools import product

import pytest

pytest.importorskip("triton")

import triton

from megatron_sgt.ops.tiles import SIZES
from tests.architecture.source_tree import ROOT
from tests.helpers.ahead_of_time import HEAD_SIZES, KERNELS, TARGETS, budget, compile_kernel
from tests.helpers.exhaustive import share_of

REGISTERS = {"gfx942": 512}
"""Most that a thread can have (255 on Nvidia's); what does not fit goes to the stack."""
FEW_BYTES = 40
"""Stack that is borne where a kernel is not tuned (all but sm_80 and sm_90, fp32, other versions of Triton than the
documented one): a few scalars, spilled once."""

Case = tuple[str, str, int, str]
DOCUMENTS = [name for name in KERNELS if "documents" in name]
TUNED: list[Case] = [
    *product((name for name in KERNELS if name not in DOCUMENTS), ("sm_80", "sm_90"), HEAD_SIZES, ("bf16",)),
    *product(DOCUMENTS, ("sm_90",), HEAD_SIZES, ("bf16",)),
]
LARGEST = (
    "project_in, uneven",
    "project_out",
    "output_gradient, uneven",
    "input_gradient",
    "attend, entropy",
    "attend, split, entropy",
    "attend_backward",
    "attend_backward, split",
)
OTHERS = [target for target in TARGETS if target not in ("sm_80", "sm_90")]
SHARE: list[Case] = [
    *product(LARGEST, OTHERS, HEAD_SIZES, ("bf16",)),
    ("attend, split, entropy", "sm_90", 128, "fp32"),
]
ALL: list[Case] = [
    *product(DOCUMENTS, ("sm_80",), HEAD_SIZES, ("bf16",)),
    *product(KERNELS, OTHERS, HEAD_SIZES, ("bf16",)),
    *product(KERNELS, ("sm_80", "sm_90"), SIZES, ("fp16", "fp32")),
]


@pytest.mark.parametrize(("name", "target", "size", "dtype"), [*TUNED, *share_of(ALL, SHARE)])
def test_fits_the_machine(name: str, target: str, size: int, dtype: str) -> None:
    found = compile_kernel(name, target, size, dtype)
    version, budgets = documented()
    tuned = target in ("sm_80", "sm_90") and dtype != "fp32" and version == triton.__version__
    assert found["stack"] <= (0 if tuned else FEW_BYTES), found
    assert 0 < found["registers"] <= REGISTERS.get(target, 255), found
    assert found["shared"] <= TARGETS[target].shared_memory, found
    if (name, target, size) in budgets and dtype == "bf16" and version == triton.__version__:
        # A program that grows says so here; the table is printed by tests.helpers.ahead_of_time --table.
        assert budget(found) == budgets[name, target, size]
    # Products of 16-bit numbers go to the matrix units, and on Hopper and Blackwell to the newest instruction alone.
    if dtype != "fp32":
        assert (found["matrix"] > 0) == KERNELS[name].tensor_cores, found
        if size in HEAD_SIZES:
            assert not found["other_products"], found


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in DOCUMENTS])
def test_arguments_of_one(name: str) -> None:
    """Triton makes constants of integers that are 1: another program, which must be valid as well."""
    ones = dict.fromkeys(("batch", "heads", "groups", "count", "repeat", "parts", "queries"), 1)
    assert compile_kernel(name, "sm_90", 64, **ones)["registers"] > 0


def documented() -> tuple[str, dict[tuple[str, str, int], str]]:
    """Triton's version, and (kernel, target, head size) -> "registers / KiB", of the table in docs/kernels.md."""
    lines = (ROOT / "docs/kernels.md").read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("| bf16, Triton "))
    columns = [(target, int(size)) for target, size in re.findall(r"(\w+) d(\d+)", lines[start])]
    rows = {}
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :]):
        kernel, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows |= {(kernel, *column): cell for column, cell in zip(columns, cells, strict=True)}
    return lines[start].split()[3], rows


def test_the_documented_budgets_are_complete() -> None:
    wanted = set(itertools.product(KERNELS, ("sm_80", "sm_90"), HEAD_SIZES))
    assert documented()[1].keys() == wanted
