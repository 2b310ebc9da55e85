"""The README's section on GPUs: the newest result in ``benchmarks/results``, or that there is none yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_parts.machine import ROOT
from gpu_parts.report import table

BEGIN, END = "<!-- GPU figures: written by gpu_suite.py --readme -->", "<!-- GPU figures: end -->"
COMMAND = "python tools/bench/gpu_suite.py"
SHOWN = ("model", "structure", "batch", "step_ms", "tokens_per_second", "mfu_percent", "memory_gb",
         "time_overhead_percent", "flops_overhead_percent")  # fmt: skip
NONE_YET = f"""Figures on GPUs are outstanding: nothing has been measured there yet. `{COMMAND} --minutes 7` (one
GPU) measures them into `benchmarks/results/`; `--dry-run` executes it on a CPU and reports no figure.
"""


def newest(results: Path) -> tuple[Path, dict[str, Any]] | None:
    """The last measured result by the date and time in its name; dry runs are passed over."""
    for file in sorted(results.glob("*.json"), key=lambda f: f.stem[-17:], reverse=True):
        result = json.loads(file.read_text(encoding="utf-8"))
        if not result["about"]["dry_run"]:
            return file, result
    return None


def section(results: Path) -> str:
    """What the README says between BEGIN and END."""
    found = newest(results)
    if found is None:
        return NONE_YET
    file, result = found
    about = result["about"]
    commit = about["commit"] or f"unknown, sources {about['sources']}"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    rows = [{name: row.get(name) for name in SHOWN} for row in result.get("training", []) if "step_ms" in row]
    lines = [
        f"`{COMMAND}` on one {about['device']} ({about['dtype']}, {versions}, commit {commit}), vanilla and",
        f"grown steps in alternation, without fusions alone. All of it: `benchmarks/results/{file.stem}.md`.",
        "",
        table(rows) if rows else "No training step was measured.",
    ]
    if result.get("targets"):
        lines += ["", table(result["targets"])]
    return "\n".join(lines) + "\n"


def update(results: Path, readme: Path = ROOT / "README.md") -> None:
    """Write the section into the README."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{BEGIN}\n{section(results)}{END}{after}", encoding="utf-8")
