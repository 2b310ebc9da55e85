#!/usr/bin/env python
"""What a run will need: parameters, memory, FLOPs, days, checkpoints, traffic, and what to mend before it starts.

Formulas alone (docs/planning.md): no GPU, no torch, under two seconds; --search takes up to a minute.

python tools/plan.py --config examples/configs/sgt_7b.yaml --gpu h100 --nodes 4
python tools/plan.py --config examples/configs/sgt_70b.yaml --gpu h100 --nodes 64 --search
python tools/plan.py --config my.yaml --gpu a100 --nodes 2 --json parallel.tensor_model_parallel_size=4
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sgt.cli import path, positive, run_main, warn, words
from megatron_sgt.config import Config, load_config
from megatron_sgt.config.base import count
from megatron_sgt.config.loader import repeated
from megatron_sgt.data.measured_pairs import measured_pairs
from megatron_sgt.data.tokenizer import build_tokenizer, resolve_vocab_size
from megatron_sgt.planning.hardware import GPUS, find_gpu
from megatron_sgt.planning.plan import make_plan
from megatron_sgt.planning.render import render
from megatron_sgt.planning.render_search import render_search, search_numbers
from megatron_sgt.planning.search import Run, search
from megatron_sgt.planning.stages import plan_stages
from megatron_sgt.planning.step_time import Machine
from megatron_sgt.stages.presets import PRESETS, preset_named

ASSUMED_VOCABULARY = 32_000


def share(text: str) -> float:
    """Type of an argument: above 0, at most 1; "40%" and "40" are 0.4."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = 0.0
    number = number / 100 if number > 1 or text.endswith("%") else number
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1 (or 100 %), got {text!r}")
    return number


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=path, required=True, metavar="FILE.yaml", help="the run")
    parser.add_argument(
        "overrides", type=words, nargs="*", metavar="section.key=value", help="values over those of the file"
    )
    parser.add_argument(
        "--preset", type=words, metavar="NAME", help=f"the file's run by another method: {', '.join(PRESETS)}"
    )
    parser.add_argument("--gpu", type=words, default="h100", metavar="NAME", help=f"{', '.join(GPUS)} [%(default)s]")
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="nodes [%(default)s]")
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="ranks of a node [%(default)s]")
    parser.add_argument(
        "--mfu",
        type=share,
        default=0.4,
        metavar="X",
        help="model FLOPs over peak, for the days [%(default)s]",
    )
    parser.add_argument(
        "--vocab-size",
        type=positive,
        metavar="N",
        help=f"where the tokenizer cannot be read here [{ASSUMED_VOCABULARY:,}]",
    )
    parser.add_argument(
        "--data",
        action="store_true",
        help="measure from data.data_path how long documents are, where no token attends to another document "
        "[every sequence is taken as one]",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="instead of the plan the fastest layouts that fit on these GPUs, and what to set for them",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return parser.parse_intermixed_args()


def with_vocabulary(config: Config, given: int | None) -> tuple[Config, list[str]]:
    """``config`` with a vocabulary: its own, the one given, the tokenizer's, or an assumed one and a warning."""
    size, notes = given or config.model.vocab_size, []
    tokenizer = config.data.tokenizer
    if size is None and tokenizer is not None and Path(tokenizer.model).exists():
        size = resolve_vocab_size(None, build_tokenizer(tokenizer))
    if size is None:
        size = ASSUMED_VOCABULARY
        where = "" if tokenizer is None else f" ({tokenizer.model} is not here)"
        notes.append(f"a vocabulary of {size:,} tokens is assumed{where}; --vocab-size N sets another")
    return config.with_vocab_size(size), notes


def main() -> None:
    """Print the plan."""
    args = parse()
    warn(repeated(args.overrides))
    config = load_config(args.config, args.overrides, preset_named(args.preset))
    config, notes = with_vocabulary(config, args.vocab_size)
    if notes and (args.search or config.parallel.pipeline_model_parallel_size > 1):
        notes.append(
            "how auto cuts the layers of a pipeline depends on the vocabulary: the run's cut may be another one"
        )
    pairs = measured_pairs(config) if args.data else None
    if args.data and pairs is None:
        notes.append(
            "--data: nothing to measure, since documents attend to each other (data.reset_attention_mask) or the data "
            "set is not indexed"
        )
    machine = Machine(find_gpu(args.gpu), args.gpus_per_node)
    world_size = args.nodes * args.gpus_per_node
    precision = config.precision_on("cpu" if config.parallel.device == "cpu" else "cuda")
    where = f"{args.config} on {count(args.nodes, 'node')} of {args.gpus_per_node} x {machine.gpu.driver_name}"
    if args.search:
        numbers = search_numbers(search(Run(plan_stages(config, pairs), world_size, machine, precision)))
        show({**numbers, "notes": notes}, args, lambda: render_search(numbers, config, f"layouts of {where}"))
        warn(notes)
        return
    plan = make_plan(config, world_size, machine, args.mfu, precision, pairs)
    plan["warnings"] += notes
    show(plan, args, lambda: render(plan, config, f"plan of {where}"))


def show(numbers: dict[str, Any], args: argparse.Namespace, text: Callable[[], str]) -> None:
    """Print ``numbers`` as JSON, or as text."""
    print(json.dumps({"config": str(args.config), **numbers}, indent=2) if args.json else text())


if __name__ == "__main__":
    run_main(main)
