#!/usr/bin/env python
"""Join indexed data sets in the order in which they are named: shards of tools/preprocess_data.py, or Megatron's."""

import argparse

from megatron_sgt.cli import output, path_text, run_main
from megatron_sgt.data.merge import merge


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefixes", type=path_text, nargs="+", metavar="PREFIX", help="data sets: PREFIX.bin and .idx")
    parser.add_argument(
        "--output-prefix",
        type=output,
        required=True,
        metavar="PREFIX",
        help="the data set to write: PREFIX.bin, .idx and .json",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing data set")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    info = merge(args.prefixes, args.output_prefix, args.overwrite)
    counts = f"{info.documents:,} documents, {info.tokens:,} tokens, of {len(args.prefixes)} data sets"
    print(f"{info.prefix}.bin/.idx: {counts}")


if __name__ == "__main__":
    run_main(main)
