"""Random inputs of the fused loop's operations, and what their implementations are held against."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.ops.backend import runs_triton
from megatron_sgt.ops.documents import Documents
from megatron_sgt.ops.head_blocks import HeadBlocks, head_blocks
from megatron_sgt.ops.rotary import Rotary, rotary_table
from megatron_sgt.parallel.packed_copy import on_device
from tests.helpers.documents import documents_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Where Triton runs (a GPU, or its interpreter in a process of its own) its kernels are tested beside the definitions.
IMPLEMENTATIONS = ["definition", *(["triton"] if runs_triton(DEVICE) else [])]
# The interpreter multiplies bf16 bit patterns: bf16 is for GPUs.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
# Largest error over the largest value. Sums are fp32 in all; inputs are rounded before the comparison.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Case:
    """Sizes of one problem: see the legend in ``loop_projection``.

    kept: heads of ``heads`` in ``groups``. factor: of cos and sin (YaRN). documents: their lengths in each sequence, in
    which positions begin again.
    """

    length: int = 48
    batch: int = 2
    width: int = 96
    size: int = 16
    heads: int = 4
    groups: int = 4
    kept: tuple[int, ...] = (1, 2)
    bias: bool = False
    head_norm: bool = False
    factor: float = 1.0
    documents: tuple[tuple[int, ...], ...] | None = None

    @property
    def layout(self) -> HeadLayout:
        return HeadLayout(self.heads, self.groups, self.size)


CASES = {
    "two heads": Case(),
    "d64, ragged": Case(length=67, batch=1, width=128, size=64),
    "d128, grouped": Case(length=70, batch=1, width=160, size=128, groups=2, kept=(0, 2, 3), head_norm=True),
    "shared group": Case(groups=2, kept=(0, 1), batch=1, factor=1.4),
    "uneven groups, norm": Case(groups=2, kept=(0, 1, 3), head_norm=True, factor=1.2),
    "biases, norm": Case(length=33, kept=(3,), bias=True, head_norm=True, documents=((10, 1, 22), (20, 13))),
    "biases": Case(length=40, width=64, groups=1, kept=(0, 2), bias=True, factor=1.3),
}


@dataclass(frozen=True)
class Problem:
    """Tensors of a case, weights of the whole layer included."""

    case: Case
    x: Tensor
    norm_weight: Tensor
    weight: Tensor
    bias: Tensor | None
    out_weight: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    angles: Tensor
    documents: Documents | None
    blocks: HeadBlocks
    eps: float = 1e-5

    @property
    def rotary(self) -> Rotary:
        table = rotary_table(self.angles, self.case.factor)
        return table if self.documents is None else table.of_documents(self.documents)

    @property
    def head_norms(self) -> tuple[Tensor, Tensor] | None:
        return None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)

    def parameters(self) -> list[Tensor]:
        """x and all weights that there are."""
        everything = (
            self.x,
            self.norm_weight,
            self.weight,
            self.bias,
            self.out_weight,
            self.q_norm,
            self.k_norm,
        )
        return [t for t in everything if t is not None]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def problem(case: Case, dtype: torch.dtype) -> Problem:
    """Inputs of order 1; norm weights off 1."""
    rows = (case.heads + 2 * case.groups) * case.size
    frequencies = 10000.0 ** -torch.arange(0, 1, 2 / case.size, dtype=torch.float64)
    angles = torch.arange(case.length, dtype=torch.float64).outer(frequencies)
    gain = 1.0 + 0.3 * random(case.width, seed=1)
    norms = [1.0 + 0.3 * random(case.size, seed=n) for n in (2, 3)] if case.head_norm else [None, None]
    return Problem(
        case=case,
        x=random(case.length, case.batch, case.width, seed=4, dtype=dtype),
        norm_weight=gain.to(dtype),
        weight=(random(rows, case.width, seed=5) / case.width**0.5).to(dtype),
        bias=random(rows, seed=6, dtype=dtype) if case.bias else None,
        out_weight=(random(case.width, case.heads * case.size, seed=7) / case.width**0.5).to(dtype),
        q_norm=None if norms[0] is None else norms[0].to(dtype),
        k_norm=None if norms[1] is None else norms[1].to(dtype),
        angles=torch.cat([angles, angles], dim=-1)[:, None, None].to(
            DEVICE, torch.float64 if dtype == torch.float64 else torch.float32
        ),
        documents=None if case.documents is None else documents_of(*case.documents, device=DEVICE),
        blocks=on_device(head_blocks(case.layout, case.kept), DEVICE),
    )


def implementation(name: str, definition: Callable[..., Any], module: str) -> Callable[..., Any]:
    """The definition, or the function of the same name in a Triton module."""
    if name == "definition":
        return definition
    return getattr(importlib.import_module(f"megatron_sgt.ops.{module}"), definition.__name__)


def exact(*tensors: Any) -> list[Any]:
    """Floating tensors in fp64, anything else as it is."""
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]


def assert_near(found: Iterable[Tensor], wanted: Iterable[Tensor], tolerance: float, what: str = "") -> None:
    """Largest difference over the largest wanted value (at least 1e-3), per tensor; all finite."""
    for n, (a, b) in enumerate(zip(found, wanted, strict=True)):
        a, b = a.detach().double(), b.detach().double()
        assert a.shape == b.shape, (what, n, a.shape, b.shape)
        if not b.numel():
            continue
        gap = float((a - b).abs().max()) / max(1e-3, float(b.abs().max()))
        assert gap <= tolerance, f"{what} result {n}: relative error {gap:.2e} above {tolerance:.1e}"
