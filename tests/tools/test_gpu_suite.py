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

MEASURED = re.compile(r"_(us|ms|share|percent|tflops|second|gb)$|^(ms|share|share_of_matmul_ceiling)$")
"""Columns that hold a time, a rate or a share."""
NOT_KNOWN = {"datasheet_tflops", "mfu_percent", "memory_gb"}
"""Of a CPU."""


def suite(*arguments: str) -> Finished:
    """In a process of its own: Triton's interpreter is chosen when Triton is imported."""
    return run_process([sys.executable, "tools/bench/gpu_suite.py", *arguments], ROOT, timeout=600)


def measured(rows: list[dict[str, Any]]) -> set[Any]:
    """What stands where a measurement does."""
    return {
        value
        for row in rows
        for name, value in row.items()
        if MEASURED.search(name) and name not in NOT_KNOWN
    }


def test_dry_run(tmp_path: Path) -> None:
    done = suite("--dry-run", "--out", str(tmp_path))
    assert done.code == 0, done.out + done.err
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["about"]["dry_run"] and measured([result["ceilings"]]) == {"dry"}
    checks = {row["check"]: row["passed"] for row in result["correctness"]}
    assert len(checks) == 9 and checks.pop("CUDA graph") is None and all(checks.values())
    assert "errors" not in result and {row["met"] for row in result["targets"]} == {None}
    assert [row["measured"] for row in result["targets"]] == [None, None, "dry", None, None]
    structures = [row["structure"] for row in result["training"] if "structure" in row]
    assert structures == [
        "vanilla",
        "vanilla, entropies measured",
        "window",
        "fixed, 1 loop",
        "fixed, 3 loops",
        "all heads, 1 loop",
        "all heads, 3 loops",
        "block loop",
        "vanilla, fusions off",
    ]
    (profile,) = (row["profile"] for row in result["training"] if "profile" in row)
    assert profile and len(result["operations"]) == 7
    assert "compiled_us" in result["passes"][0] and "custom_whole_keys_us" in result["attention"][0]
    for name in ("passes", "attention", "operations", "entropy"):
        assert measured(result[name]) == {"dry"}, name
    steps = [row for row in result["training"] if "structure" in row]
    assert measured(steps) == measured(profile) == {"dry"}
    assert not re.search(
        r"\d\.\d", json.dumps({**result, "about": None, "correctness": None, "targets": None})
    )
    assert "It measures nothing" in file.with_suffix(".md").read_text(encoding="utf-8")


BROKEN = """
import runpy, sys
sys.path.insert(0, "tools/bench")
from gpu_parts import correctness, kernels

def half(machine):
    yield {"B": 1}
    raise RuntimeError("no such kernel\\nand more")

def broken(*_):
    raise ValueError("graphs")

kernels.attentions, kernels.passes, correctness.graph_capture = half, half, broken
sys.argv = ["tools/bench/gpu_suite.py", *sys.argv[1:]]
runpy.run_path("tools/bench/gpu_suite.py", run_name="__main__")
"""


def test_what_was_measured_outlives_what_breaks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BROKEN, "--dry-run", "--no-golden", "--only"]
    done = run_process([*command, "kernels", "--out", str(tmp_path / "a")], ROOT, timeout=600)
    assert done.code == 1 and "FAILED: attention, passes" in done.out
    (file,) = (tmp_path / "a").glob("*.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["attention"] == result["passes"] == [{"B": 1}] and len(result["entropy"]) == 1
    assert result["errors"]["passes"] == "RuntimeError: no such kernel"
    assert "**attention ended early:** RuntimeError" in file.with_suffix(".md").read_text(encoding="utf-8")
    done = run_process([*command, "correctness", "--out", str(tmp_path / "b")], ROOT, timeout=600)
    assert done.code == 1 and "FAILED: CUDA graph" in done.out and "ValueError: graphs" in done.out


def test_targets_are_held_against_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))
    from gpu_parts.targets import verdicts

    fixed = {
        "model": "1.2B",
        "structure": "fixed, 1 loop",
        "time_overhead_percent": 1.4,
        "flops_overhead_percent": 1.0,
    }
    vanilla = {"model": "1.2B", "structure": "vanilla", "mfu_percent": 44.0}
    measured = {"model": "1.2B", "structure": "vanilla, entropies measured", "time_overhead_percent": 0.1}
    attention = [
        {"B": 1, "custom_share": 0.1, "library_share": 0.2},
        {"B": 2, "custom_share": 0.6, "library_share": 0.4},
        {"B": 4, "custom_share": 0.3, "library_share": 0.55},
    ]
    found = verdicts(
        {"training": [vanilla, measured, fixed, {"model": "1.2B", "skipped": "x"}], "attention": attention}
    )
    assert [(row["measured"], row["met"]) for row in found] == [
        (1.4, True),
        (1.4, False),
        (0.55, True),
        (0.1, True),
        (44.0, False),
    ]
    assert {row["met"] for row in verdicts({})} == {None}


def test_both_ways_of_an_operation_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else their times would say nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))
    from gpu_parts.loop_pass import pass_inputs
    from gpu_parts.operations import operations, rotary

    p = pass_inputs(24, 2, 64, 16, torch.device("cpu"), torch.float32)
    *compared, weights = operations(p)
    assert len(compared) == 5
    for operation in compared:
        found = operation.kernel()
        found = found[0] if isinstance(found, tuple) else found
        wanted = operation.eager().flatten(2)
        torch.testing.assert_close(found.flatten(2), wanted, rtol=1e-4, atol=1e-5, msg=operation.name)
    assert weights.kernel() is weights.eager() is None
    assert rotary(p, 64).bytes == 8 * 24 * 2 * 64 * 4


def test_the_readme_shows_the_newest_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))
    from gpu_parts import readme

    written = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, rest = written.partition(f"{readme.BEGIN}\n")
    shown, end, _ = rest.partition(readme.END)
    assert end and shown == readme.section(ROOT / "benchmarks/results")

    about = {"device": "H200", "dry_run": False, "dtype": "bf16", "commit": "abc", "versions": {"torch": "2"}}
    row = {"model": "1.2B", "structure": "vanilla", "step_ms": 100.0}
    for name, figure, dry in (
        ("h200-2026-11-01-120000", 1.0, False),
        ("a100-2026-11-02-120000", 2.0, False),
        ("dry-run-2026-11-03-120000", 3.0, True),
    ):
        result = {"about": {**about, "dry_run": dry}, "training": [{**row, "step_ms": figure}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n", encoding="utf-8")
    readme.update(tmp_path, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "a100-2026-11-02-120000.md" in text and "| 1.2B | vanilla | - | 2 |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = suite("--out", str(tmp_path))
    assert done.code == 2 and "--dry-run executes it on a CPU" in done.err
    assert not list(tmp_path.iterdir())
