#!/usr/bin/env python
"""Show what checkpoints hold: step, tokens, layout, growth, sizes, and whether they are whole.

python tools/inspect_checkpoint.py runs/a/checkpoints                    all of a run, the latest in full
python tools/inspect_checkpoint.py runs/a/checkpoints/global_step1000    one of them

Exit code 4 when a finished checkpoint that was looked at is damaged, when the one asked for was never
finished, or when ``latest`` names none.
"""

from __future__ import annotations

import argparse
import json

from megatron_sgt.cli import path, run_main
from megatron_sgt.errors import CheckpointError


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=path, metavar="CKPT_OR_ROOT", help="a folder of checkpoints, or one of them")
    parser.add_argument(
        "--checksums", action="store_true", help="read every byte and compare its checksum, not sizes alone"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser.parse_args()


def main() -> int:
    """Print; returns the exit code."""
    args = parse()
    from megatron_sgt.checkpoint.contents import is_checkpoint, read_contents, read_root
    from megatron_sgt.checkpoint.describe import describe, describe_root
    from megatron_sgt.checkpoint.manifest import checksum_problems, size_problems
    from megatron_sgt.lease import holder_of, inside

    check = checksum_problems if args.checksums else size_problems
    if not args.checkpoint.exists():
        raise CheckpointError(f"no checkpoint at {args.checkpoint}: the folder does not exist")
    if is_checkpoint(args.checkpoint):
        one = read_contents(args.checkpoint, check)
        text, values, whole = describe(one), one.to_dict(), one.status == "complete"
    else:
        root = read_root(args.checkpoint, check)
        text, values = describe_root(root), root.to_dict()
        whole = root.problem is None and all(one.status != "damaged" for one in root.checkpoints)
    root_folder = args.checkpoint.parent if is_checkpoint(args.checkpoint) else args.checkpoint
    if holder := holder_of(inside(root_folder)):
        text += f"\n\nheld by {holder.name} since {holder.began}, which may be changing it"
        values["held_by"] = holder.name
    print(json.dumps(values, indent=1) if args.json else text)
    return 0 if whole else CheckpointError.exit_code


if __name__ == "__main__":
    run_main(main)
