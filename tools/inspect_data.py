#!/usr/bin/env python
"""Show a data set: documents, tokens, lengths, and samples as the model sees them, with their documents and masks.

python tools/inspect_data.py data/c4_text_document --tokenizer data/tokenizer.model --samples 2
python tools/inspect_data.py data/c4_text_document --samples 0 model.seq_length=4096 data.packing=best_fit
python tools/inspect_data.py --config examples/configs/sgt_300m.yaml --split valid --first 10

With --config it is the data of a run, or PREFIX in its place, in the run's order and form. Without, documents are
kept apart, and samples have 1,024 tokens.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict

from megatron_sgt.cli import path, path_text, run_main, words, zero_or_more

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)+=")


def parse() -> tuple[argparse.Namespace, str | None, list[str]]:
    """Command-line arguments; the prefix among them, and the settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words",
        type=words,
        nargs="*",
        metavar="PREFIX | section.key=value",
        help="of a .bin/.idx pair; settings in place of the run's or the usual ones",
    )
    parser.add_argument("--config", type=path, metavar="FILE.yaml", help="a run, for its data and settings")
    parser.add_argument(
        "--tokenizer", type=path_text, metavar="MODEL", help="decodes the samples, in place of the run's: a path"
    )
    parser.add_argument(
        "--split", type=words, choices=("train", "valid", "test"), default="train", help="of the samples [%(default)s]"
    )
    parser.add_argument("--first", type=zero_or_more, default=0, metavar="I", help="number of a sample [%(default)s]")
    parser.add_argument("--samples", type=zero_or_more, default=1, metavar="N", help="samples to show [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_intermixed_args()
    overrides = [word for word in args.words if _OVERRIDE.match(word)]
    prefixes = [path_text(word) for word in args.words if not _OVERRIDE.match(word)]
    if len(prefixes) > 1:
        parser.error(f"give one PREFIX, not {' and '.join(prefixes)}")
    if not prefixes and args.config is None:
        parser.error("give the PREFIX of a .bin/.idx pair, or a run's --config")
    return args, prefixes[0] if prefixes else None, overrides


def main() -> None:
    """Print."""
    args, prefix, overrides = parse()
    from megatron_sgt.config import TokenizerConfig, load_config
    from megatron_sgt.data.inspection import assumed_config, inspect

    if args.tokenizer is not None:
        overrides.append(f"data.tokenizer={TokenizerConfig.at(args.tokenizer).model_dump_json()}")
    if args.config is not None:
        replaced = [] if prefix is None else [f"data.data_path={json.dumps([prefix])}"]
        config = load_config(args.config, [*replaced, *overrides])
    else:
        config = assumed_config(str(prefix), overrides)
    found = inspect(config, args.split, args.first, args.samples)
    print(json.dumps(asdict(found), indent=1) if args.json else "\n".join(found.lines()))


if __name__ == "__main__":
    run_main(main)
