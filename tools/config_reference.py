#!/usr/bin/env python
"""Write docs/configuration.md, the reference of every setting, from the configuration classes."""

import argparse
from pathlib import Path

from megatron_sgt.cli import path, run_main
from megatron_sgt.config.reference import reference
from megatron_sgt.stages.presets import GROWING

DEFAULT = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=path, default=DEFAULT, metavar="FILE.md", help="[%(default)s]")
    args = parser.parse_args()
    growing = {name: preset.summary for name, preset in GROWING.items()}
    args.output.write_text(reference(growing), encoding="utf-8")
    print(args.output)


if __name__ == "__main__":
    run_main(main)
