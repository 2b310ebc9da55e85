#!/usr/bin/env python
"""Checks and measures the whole system on one GPU within some minutes, without network, data or git.

python tools/bench/gpu_suite.py --minutes 7           # writes benchmarks/results/<device>-<date>.json and .md
python tools/bench/gpu_suite.py --dry-run             # every row on a CPU in tiny shapes; measures nothing
python tools/bench/gpu_suite.py --part attention --part passes     # rows of these parts alone, and the ceilings
python tools/bench/gpu_suite.py --list                # the rows in order of worth, with their parts
python tools/bench/gpu_suite.py --readme              # show the newest result in README.md

Both files are written anew after every row, so that whatever ends the suite loses no row that was measured.
exit codes: 0 every row ran and every check passed; 1 one did not; 2 usage, or no GPU
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_parts.drive import Drive
from gpu_parts.figures import without_figures, write
from gpu_parts.report import markdown
from gpu_parts.rows import PARTS, table
from gpu_parts.targets import verdicts

from megatron_sgt.cli import path, positive, run_main

ROOT = Path(__file__).resolve().parents[2]
RESULTS, DRY_RESULTS = ROOT / "benchmarks/results", ROOT / "runs/gpu_suite"
DRY_PATIENCE = 5.0
"""A row may take so many times longer on a CPU that others use as well."""


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="execute everything on a CPU, report no figure")
    parser.add_argument("--part", choices=PARTS, action="append", help="these rows alone; repeatable")
    parser.add_argument("--list", action="store_true", help="name the rows, measure nothing")
    parser.add_argument("--readme", action="store_true", help="show the newest result in README.md, measure nothing")
    parser.add_argument("--out", type=path, help="folder of the result (a dry run's: runs/gpu_suite)")
    parser.add_argument("--minutes", type=positive, default=7, help="time for everything [%(default)s]")
    args = parser.parse_args()
    args.out = args.out or (DRY_RESULTS if args.dry_run else RESULTS)
    return args


def measure(args: argparse.Namespace) -> int:
    """Run the rows, write the result after each, and fail if a row or a check did."""
    started = time.strftime("%Y-%m-%d-%H%M%S")
    deadline = time.monotonic() + 60 * args.minutes
    rows = [row for row in table(args.dry_run) if args.part is None or row.part in (*args.part, "ceilings")]
    if args.dry_run:
        rows = [replace(row, limit=DRY_PATIENCE * row.limit) for row in rows]

    def shown(result: dict[str, Any]) -> dict[str, Any]:
        whole = {**result, "targets": verdicts(result)}
        return without_figures(whole) if args.dry_run else whole

    def keep(result: dict[str, Any]) -> None:
        name = "dry-run" if args.dry_run else re.sub(r"\W+", "-", str(result["about"].get("device"))).lower()
        write(shown(result), args.out / f"{name}-{started}.json")

    # Asked to stop: what runs is killed on the way out; what was measured is written already.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    result = Drive(rows, args.dry_run, deadline, keep).run()
    print(markdown(shown(result)))
    print(f"written: {args.out}/*-{started}.json and .md")
    failed = [row["check"] for row in result["correctness"] if row["passed"] is False]
    failed += [row["row"] for row in result["rows"] if row["error"]]
    failed += ["a run, killed and resumed" for row in result["runs"] if not row["passed"]]
    if failed:
        print(f"FAILED: {', '.join(dict.fromkeys(failed))}")
    return 1 if failed else 0


def main() -> int:
    """Do what was asked for."""
    args = parse()
    if args.list:
        print("\n".join(f"{row.part:12} {row.name}" for row in table(args.dry_run)))
        return 0
    if args.readme:
        from gpu_parts.readme import update

        update(args.out)
        print("README.md shows the newest result")
        return 0
    return measure(args)


if __name__ == "__main__":
    run_main(main)
