#!/usr/bin/env python
"""Train a small model through hundreds of faults, and check after each that nothing was lost.

python tools/soak.py --deaths 50 --layout tp2-zero1      # any of tp2-zero1 tp2-zero3 dp2-zero1 dp2-zero3; default: all
python tools/soak.py --deaths 20 --seed 3 --output table.json

Ranks are killed at random moments, a good part of them inside a save, get signals, stand still for a while; files of
the newest checkpoint are truncated, deleted or get one bit flipped; the disk is full. After every death: ``latest``
names a checkpoint whose files are all whole, the next start continues from the newest undamaged one, and every step
repeats the losses, gradient norms and entropies of an uninterrupted run bit for bit. The order of the faults, the
steps and the ranks that they strike follow from the seed; the moment within a step is the machine's.
exit codes: 0 nothing was lost; 1 something was, and is reported; 2 usage
"""

import argparse
import json
from functools import partial

from soak_parts.ranks import start_server
from soak_parts.run import soak
from soak_parts.tally import Tally, table
from soak_parts.workload import LAYOUTS

from megatron_sgt.cli import path, positive, run_main, seed


def main() -> None:
    """Soak the layouts one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deaths", type=positive, default=50, metavar="N", help="per layout [%(default)s]")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="repeatable [all]")
    parser.add_argument("--seed", type=seed, default=1, metavar="N", help="[%(default)s]")
    parser.add_argument("--output", type=path, metavar="FILE.json", help="the table as JSON, too")
    args = parser.parse_args()
    start_server()
    tallies = {name: Tally() for name in args.layout or LAYOUTS}
    try:
        for name, tally in tallies.items():
            soak(name, args.deaths, args.seed, tally, partial(_tell, name))
    finally:
        print(table(tallies))
        if args.output is not None:
            found = {name: vars(tally) for name, tally in tallies.items()}
            args.output.write_text(json.dumps(found, indent=1), encoding="utf-8")


def _tell(name: str, line: str) -> None:
    print(f"{name}: {line}", flush=True)


if __name__ == "__main__":
    run_main(main)
