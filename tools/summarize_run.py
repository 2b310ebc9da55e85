#!/usr/bin/env python
"""Summarize a run from its metrics file: losses, growth events, restarts, where things lie."""

import argparse
import sys

from megatron_sgt.cli import path, run_main
from megatron_sgt.jsonl import read_metrics
from megatron_sgt.metrics import METRICS_FILE
from megatron_sgt.metrics.console import paint_for
from megatron_sgt.metrics.summary import run_summary


def main() -> None:
    """Print the summary of one run directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=path, help="logging.run_dir of the run")
    args = parser.parse_args()
    print(run_summary(read_metrics(args.run_dir / METRICS_FILE), args.run_dir, paint_for(sys.stdout)))


if __name__ == "__main__":
    run_main(main)
