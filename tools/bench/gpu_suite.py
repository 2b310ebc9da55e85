#!/usr/bin/env python
"""Checks and measures the whole system on one GPU, in at most eight minutes, without network or data.

python tools/bench/gpu_suite.py                    # writes benchmarks/results/<device>-<date>.json and .md
python tools/bench/gpu_suite.py --dry-run          # every branch on a CPU in tiny shapes; measures nothing
python tools/bench/gpu_suite.py --only kernels     # one section: correctness, kernels, training
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from megatron_sgt.cli import positive, run_main
from megatron_sgt.errors import ConfigError

SECTIONS = ("correctness", "kernels", "training")
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="execute everything on a CPU, report no time")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--no-golden", action="store_true", help="leave the golden trajectory out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--minutes", type=positive, default=8, help="time for everything (default 8)")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the sections."""
    # Triton reads this when it is imported, which the libraries below do.
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        raise ConfigError("gpu_suite measures a GPU, and torch sees none; --dry-run executes it on a CPU")
    from gpu_parts import correctness, kernels, machine, training

    this = machine.Machine(
        device=torch.device("cpu" if args.dry_run else "cuda"),
        dtype=torch.float32 if args.dry_run else torch.bfloat16,
        dry=args.dry_run,
        deadline=time.monotonic() + 60 * args.minutes,
    )
    wanted = [args.only] if args.only else list(SECTIONS)
    result: dict[str, Any] = {"about": machine.identity(this), "ceilings": machine.measure_ceilings(this)}
    if "correctness" in wanted:
        result["correctness"] = correctness.run(this, with_golden=not args.no_golden)
    if "training" in wanted:
        result["training"] = training.run(this)
    if "kernels" in wanted:
        result["attention"] = kernels.attentions(this)
        result["entropy"] = kernels.entropies(this)
        result["passes"] = kernels.passes(this)
    return result


def main() -> int:
    """Measure, write, and fail if a check of correctness did."""
    args = parse()
    result = measure(args)
    from gpu_parts.report import markdown

    text = markdown(result)
    args.out.mkdir(parents=True, exist_ok=True)
    device = "dry-run" if args.dry_run else re.sub(r"\W+", "-", result["about"]["device"]).lower()
    stem = args.out / f"{device}-{time.strftime('%Y-%m-%d-%H%M%S')}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(f"written: {stem}.json and .md")
    failed = [row["check"] for row in result.get("correctness", []) if row["passed"] is False]
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
