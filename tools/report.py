#!/usr/bin/env python
"""Write the report of a run: one HTML page and its pictures, from the run directory alone."""

import argparse

from megatron_sgt.cli import path, run_main


def main() -> None:
    """Write the report and say where it lies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=path, help="logging.run_dir of the run; it may still be running")
    parser.add_argument("--output", type=path, metavar="DIR", help="folder to write to (default: RUN_DIR/report)")
    args = parser.parse_args()
    from megatron_sgt.reporting.report import write_report

    page, *pictures = write_report(args.run_dir, args.output)
    print(f"{page}  ({len(pictures)} pictures beside it)")


if __name__ == "__main__":
    run_main(main)
