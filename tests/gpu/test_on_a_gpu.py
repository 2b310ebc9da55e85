"""What only a GPU can show: the suite's checks of correctness, one test each."""

import sys
import time

import pytest
import torch

from tests.architecture.source_tree import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def suite() -> object:
    """(module of checks, machine) of tools/bench."""
    sys.path.insert(0, str(ROOT / "tools/bench"))
    from gpu_parts import correctness, machine

    return correctness, machine.Machine(
        torch.device("cuda"), torch.bfloat16, dry=False, deadline=time.monotonic() + 600
    )


@pytest.mark.parametrize("way", ["custom", "split", "library"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tolerance(dtype: torch.dtype, way: str, suite: tuple) -> None:
    row = suite[0].tolerance(suite[1], dtype, way)
    assert row["passed"], row


@pytest.mark.parametrize("check", ["determinism", "graph_capture", "golden"])
def test_check(check: str, suite: tuple) -> None:
    row = getattr(suite[0], check)(suite[1])
    assert row["passed"], row
