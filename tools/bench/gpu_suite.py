#!/usr/bin/env python
"""Checks and measures the whole system on one GPU, in at most eight minutes, without network or data.

python tools/bench/gpu_suite.py                    # writes benchmarks/results/<device>-<date>.json and .md
python tools/bench/gpu_suite.py --dry-run          # every branch on a CPU in tiny shapes; measures nothing
python tools/bench/gpu_suite.py --readme           # show the newest result in README.md
python tools/bench/gpu_suite.py --only kernels     # one section: correctness, kernels, training
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_sgt.cli import positive, run_main
from megatron_sgt.errors import ConfigError

SECTIONS = ("correctness", "kernels", "training")
ROOT = Path(__file__).resolve().parents[2]
RESULTS, DRY_RESULTS = ROOT / "benchmarks/results", ROOT / "runs/gpu_suite"


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="execute everything on a CPU, report no figure"
    )
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--no-golden", action="store_true", help="leave the golden trajectory out")
    parser.add_argument(
        "--readme", action="store_true", help="show the newest result in README.md, measure nothing"
    )
    parser.add_argument("--out", type=Path, help="folder of the result (a dry run's: runs/gpu_suite)")
    parser.add_argument("--minutes", type=positive, default=8, help="time for everything (default 8)")
    args = parser.parse_args()
    args.out = args.out or (DRY_RESULTS if args.dry_run else RESULTS)
    return args


def measure(args: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run the sections; ``keep`` is called with the result so far after each part, so that little can be lost.

    A part that raises is named under "errors", with the rows that it had given; the others run.
    """
    # Triton reads this when it is imported, which the libraries below do.
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        raise ConfigError("gpu_suite measures a GPU, and torch sees none; --dry-run executes it on a CPU")
    from gpu_parts import correctness, kernels, machine, operations, targets, training

    this = machine.Machine(
        device=torch.device("cpu" if args.dry_run else "cuda"),
        dtype=torch.float32 if args.dry_run else torch.bfloat16,
        dry=args.dry_run,
        deadline=time.monotonic() + 60 * args.minutes,
    )
    result: dict[str, Any] = {"about": machine.identity(this), "ceilings": machine.measure_ceilings(this)}
    parts: dict[str, tuple[str, Callable[[], Iterator[dict[str, Any]]]]] = {
        "correctness": ("correctness", lambda: correctness.run(this, with_golden=not args.no_golden)),
        "training": ("training", lambda: training.run(this)),
        "attention": ("kernels", lambda: kernels.attentions(this)),
        "entropy": ("kernels", lambda: kernels.entropies(this)),
        "operations": ("kernels", lambda: operations.run(this)),
        "passes": ("kernels", lambda: kernels.passes(this)),
    }
    shown = machine.without_figures if this.dry else lambda measured: measured
    for name, (section, rows) in parts.items():
        if args.only not in (None, section):
            continue
        result[name] = []
        try:
            for row in rows():
                result[name].append(row)
        except Exception as error:
            traceback.print_exc()
            result.setdefault("errors", {})[name] = machine.first_line(error)
        result["targets"] = targets.verdicts(result)
        keep(shown(result))
    return shown(result)


def main() -> int:
    """Measure, write, and fail if a check of correctness or a part did."""
    args = parse()
    if args.readme:
        from gpu_parts.readme import update

        update(args.out)
        print("README.md shows the newest result")
        return 0
    started = time.strftime("%Y-%m-%d-%H%M%S")

    def keep(result: dict[str, Any]) -> None:
        device = "dry-run" if args.dry_run else re.sub(r"\W+", "-", result["about"]["device"]).lower()
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / f"{device}-{started}.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(markdown(result), encoding="utf-8")

    from gpu_parts.report import markdown

    result = measure(args, keep)
    print(markdown(result))
    print(f"written: {args.out}/*-{started}.json and .md")
    failed = [row["check"] for row in result.get("correctness", []) if row["passed"] is False]
    failed += result.get("errors", {})
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
