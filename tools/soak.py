#!/usr/bin/env python
"""Train a small model through hundreds of faults, and check after each that nothing was lost.

python tools/soak.py                                             # all layouts, 286 deaths
python tools/soak.py --layout tp2-zero1 --saves async --deaths 50 --seed 3 --output table.json

Saves are synchronous, then asynchronous. Ranks are killed at random moments, a good part of them inside a save or at an
exact moment of one (between its files, before and after its manifest, before ``latest``, in a deletion), get signals,
stand still for a while; files of the newest checkpoint are truncated, deleted or get one bit flipped; the disk is full.
The same command is started a second time; the process that holds the run's folders is killed, or stopped until another
start has taken them over and then continued, both inside the same save if it so happens.

After every death: ``latest`` names a checkpoint whose files are all whole, the next start continues from the newest
undamaged one, and every step repeats the losses, gradient norms and entropies of an uninterrupted run bit for bit. A
second start ends with 4 and harms nobody, a killed holder is not waited for, a stopped one writes nothing more and ends
with 4. The order of the faults, the steps and the ranks that they strike follow from the seed; the moment within a step
is the machine's.
exit codes: 0 nothing was lost; 1 something was, and is reported; 2 usage
"""

import argparse
import json
from functools import partial

from soak_parts.ranks import start_server
from soak_parts.run import soak
from soak_parts.tally import Tallies, Tally, tables
from soak_parts.workload import LAYOUTS, SAVES

from megatron_sgt.cli import path, positive, run_main, seed


def main() -> None:
    """Soak the layouts one after the other and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="repeatable [all]")
    parser.add_argument("--saves", choices=SAVES, action="append", help="repeatable [both]")
    parser.add_argument(
        "--deaths", type=positive, default=13, metavar="N", help="per layout and kind of saves [%(default)s]"
    )
    parser.add_argument("--seed", type=seed, default=1, metavar="N", help="[%(default)s]")
    parser.add_argument("--output", type=path, metavar="FILE.json", help="what the tables show, as JSON")
    args = parser.parse_args()
    start_server()
    tallies = {name: {saves: Tally() for saves in args.saves or SAVES} for name in args.layout or LAYOUTS}
    try:
        for name, by_saves in tallies.items():
            soak(name, args.deaths, args.seed, by_saves, partial(_tell, name))
    finally:
        print(tables(tallies))
        if args.output is not None:
            args.output.write_text(json.dumps(_plain(tallies), indent=1), encoding="utf-8")


def _tell(name: str, saves: str, line: str) -> None:
    print(f"{name} {saves}: {line}", flush=True)


def _plain(tallies: Tallies) -> dict[str, dict[str, object]]:
    return {name: {saves: vars(tally) for saves, tally in by.items()} for name, by in tallies.items()}


if __name__ == "__main__":
    run_main(main)
