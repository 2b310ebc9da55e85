#!/usr/bin/env python
"""Search how deep a model should become next, as AutoProg does: train sub-nets of the deepest candidate for a while.

python tools/search_stage.py --load runs/a/checkpoints --depths 6,9,12 --steps 200
torchrun --nproc-per-node 8 tools/search_stage.py --load runs/a/checkpoints --depths 6,9,12 --steps 200

The deepest candidate is grown from the checkpoint (from the average of its weights, where there is one), in memory.
In each step one random candidate is trained in it; then each one's validation loss and time per step are compared.
Prints the choice, and the entry of growth.stages that makes it. Nothing is written. docs/growing.md says more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.forms import read_config, read_state
from megatron_sgt.cli import path, positive, warn, words
from megatron_sgt.config import Config, load_config
from megatron_sgt.config.loader import repeated
from megatron_sgt.errors import ConfigError
from megatron_sgt.guard.ending import place, run_rank
from megatron_sgt.metrics.units import si
from megatron_sgt.paths import as_recorded, expand
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.stages.config import grown_config
from megatron_sgt.stages.operators import OPERATORS
from megatron_sgt.stages.search import check_length, judge, stage_entry, supernet

if TYPE_CHECKING:
    from megatron_sgt.engine.stage_search import Measured


def depths(text: str) -> tuple[int, ...]:
    """Type of an argument: numbers of layers with commas between them."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers of layers, as 6,9,12, got {text!r}") from None


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--load", type=path, required=True, metavar="CKPT", help="a folder of checkpoints, or one of them"
    )
    parser.add_argument(
        "--depths", type=depths, required=True, metavar="A,B,C", help="three candidates, the lowest first"
    )
    parser.add_argument("--steps", type=positive, required=True, metavar="N", help="optimizer steps of the search")
    parser.add_argument(
        "--config", type=path, metavar="FILE.yaml", help="data, batches and layout of the search [the checkpoint's]"
    )
    parser.add_argument(
        "overrides", type=words, nargs="*", metavar="section.key=value", help="values over those of the file"
    )
    return parser.parse_intermixed_args()


def config_of(folder: Path, args: argparse.Namespace) -> Config:
    """The run's configuration, with model and growth of the checkpoint ``folder``.

    Raises:
        CheckpointError: the checkpoint's cannot be read.
        ConfigError: the given one is wrong, too short, or a candidate does not fit it.
    """
    there = read_config(folder)
    fill_in = expand if args.config else as_recorded
    given = load_config(args.config or folder / layout.CONFIG_FILE, args.overrides, fill_in=fill_in)
    if foreign := [name for name in args.overrides if name.startswith(("model.", "growth."))]:
        raise ConfigError(f"{foreign[0]}: model and growth are those of the checkpoint; remove it")
    if given.phases:
        raise ConfigError(
            "phases: a search trains with one batch, blend and learning-rate curve; give phases=[] "
            "and what holds where the checkpoint is (train.global_batch_size, data.data_path, optim.lr)"
        )
    step = read_state(folder)["trainer"]["step"]
    config = given.model_copy(update={"model": there.at_step(step).model, "growth": there.growth})
    supernet(config.model, args.depths)
    check_length(config, step, args.steps)
    for depth in args.depths:
        if depth > config.model.num_layers:
            grown_config(config, OPERATORS["auto_prog"](config.model, {"num_layers": depth}), step)
    return config


def report(config: Config, measured: Measured) -> list[str]:
    """The table, the choice, and why."""
    verdict = judge(measured.losses, measured.seconds)
    lines = ["layers  parameters  validation loss  seconds per step  loss x seconds^w"]
    for depth, loss in measured.losses.items():
        count = parameter_count(config.model.model_copy(update={"num_layers": depth}))
        mark = "  <- lowest" if depth == verdict.best else ""
        lines.append(
            f"{depth:6}  {si(count, ' '):>10}  {loss:15.4f}  {measured.seconds[depth]:16.4f}"
            f"  {verdict.scores[depth]:16.4f}{mark}"
        )
    falls = f"w = {verdict.exponent:.4f}: the loss falls as seconds^-w over the candidates"
    return [*lines, falls if verdict.exponent else "w = 0: more time per step brings no lower loss"]


def main() -> int:
    """Search, and print what was found."""
    args = parse()
    info = place()
    folder = layout.resolve(args.load)
    config = config_of(folder, args)
    config.num_micro_batches(info.world_size)
    if info.rank == 0:
        warn(repeated(args.overrides))
    from megatron_sgt.engine.prepare import prepare_process

    prepare_process(config, info)
    from megatron_sgt.engine.build import start_processes
    from megatron_sgt.engine.stage_search import StageSearch
    from megatron_sgt.parallel.groups import destroy_groups

    groups = start_processes(config, info)

    def say(text: str) -> None:
        if groups.is_main:
            print(text, flush=True)

    growth = supernet(config.model, args.depths)
    search = StageSearch(folder, config, growth, args.depths, groups)
    source = "the average of its weights" if search.averaged else "its weights (the run keeps no average of them)"
    say(f"{folder}: {growth.old.num_layers} layers; {growth.new.num_layers} are made of {source}")
    measured = search.run(
        args.steps,
        lambda step, losses: say(
            f"step {step:,} of {args.steps:,}: loss " + ", ".join(f"{loss:.4f} ({d})" for d, loss in losses.items())
        ),
    )
    say("\n".join(report(config, measured)))
    best = judge(measured.losses, measured.seconds).best
    if best == growth.old.num_layers:
        say(f"keep {best} layers for now: no entry in growth.stages")
    else:
        say(f"grow to {best} layers:\n" + stage_entry(best, search.step, "ema" if search.averaged else "weights"))
    destroy_groups()
    return 0


if __name__ == "__main__":
    sys.exit(run_rank(main))
