"""What only a GPU can show: the suite's checks of correctness, one test each."""

import importlib
import sys

import pytest
import torch

from tests.architecture.source_tree import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def suite() -> object:
    """The machine of tools/bench."""
    sys.path.insert(0, str(ROOT / "tools/bench"))
    from gpu_parts.machine import Machine

    return Machine.make(dry=False)


@pytest.mark.parametrize("way", ["custom", "split", "library"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_tolerance(dtype: str, way: str, suite: object) -> None:
    from gpu_parts.correctness import tolerance

    (row,) = tolerance(suite, dtype, way)
    assert row["passed"], row


@pytest.mark.parametrize(
    ("module", "check", "arguments"),
    [
        ("correctness", "determinism", ()),
        ("correctness", "graph_capture", ()),
        ("library_attention", "check", ("MHA",)),
        ("library_attention", "check", ("GQA",)),
        ("library_attention", "documents", ("GQA",)),
        ("pipeline", "given_away", ()),
        ("pipeline", "settings", ()),
        ("runs", "golden", ()),
        ("runs", "killed_and_resumed", ()),
    ],
)
def test_check(module: str, check: str, arguments: tuple, suite: object) -> None:
    (row,) = getattr(importlib.import_module(f"gpu_parts.{module}"), check)(suite, *arguments)
    assert row["passed"], row
