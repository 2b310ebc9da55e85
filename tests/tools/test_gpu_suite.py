"""The GPU suite, executed on a CPU: every branch runs, and nothing is reported as if it had been measured."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import ROOT, Finished, run_process

pytest.importorskip("triton")

NOT_TIMES = {"flops_overhead_percent"}


def suite(*arguments: str) -> Finished:
    """In a process of its own: Triton's interpreter is chosen when Triton is imported."""
    return run_process([sys.executable, "tools/bench/gpu_suite.py", *arguments], ROOT, timeout=600)


def numbers(row: dict[str, Any]) -> list[str]:
    """Columns of a row that hold a time, a rate or a share."""
    units = re.compile(r"_(us|ms|share|percent|tflops|second|gb)$|^(ms|memory_gb)$")
    return [
        name
        for name, value in row.items()
        if units.search(name) and name not in NOT_TIMES and value is not None
    ]


def test_dry_run(tmp_path: Path) -> None:
    done = suite("--dry-run", "--no-golden", "--out", str(tmp_path))
    assert done.code == 0, done.out + done.err
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["about"]["dry_run"] and set(result["ceilings"].values()) == {None}
    checks = {row["check"]: row["passed"] for row in result["correctness"]}
    assert len(checks) == 6 and checks.pop("CUDA graph") is None and all(checks.values())
    structures = [row["structure"] for row in result["training"] if "structure" in row]
    assert structures == [
        "vanilla",
        "window",
        "fixed, 1 loop",
        "fixed, 3 loops",
        "all heads, 1 loop",
        "block loop",
    ]
    assert result["training"][-1]["profile"]
    assert "compiled_us" in result["passes"][0] and "custom_us" in result["attention"][0]
    rows = [row for name in ("passes", "attention", "entropy", "training") for row in result[name]]
    rows += result["training"][-1]["profile"]
    assert not [found for row in rows if (found := numbers(row))]
    assert "It measures nothing" in file.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = suite("--out", str(tmp_path))
    assert done.code == 2 and "--dry-run executes it on a CPU" in done.err
    assert not list(tmp_path.iterdir())
