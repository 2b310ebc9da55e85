#!/usr/bin/env python
"""Compare runs at equal steps, equal FLOPs and equal time: one HTML page and its pictures."""

import argparse

from megatron_sgt.cli import path, run_main, words


def main() -> None:
    """Write the comparison and say where it lies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dirs", type=path, nargs="+", metavar="RUN_DIR", help="the first is the baseline")
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--names", type=words, metavar="A,B,...", help="names of the runs (default: their folders')")
    args = parser.parse_args()
    from megatron_sgt.reporting.compare import write_comparison

    names = args.names.split(",") if args.names else None
    page, *pictures = write_comparison(args.run_dirs, args.output, names)
    print(f"{page}  ({len(pictures)} pictures beside it)")


if __name__ == "__main__":
    run_main(main)
