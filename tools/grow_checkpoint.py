#!/usr/bin/env python
"""Grow a checkpoint into one of a deeper or wider model, and write the configuration that trains it on.

python tools/grow_checkpoint.py --load runs/a/checkpoints --operator g_stack --factor 4 --output runs/a4
torchrun --nproc-per-node 8 pretrain_sgt.py --config runs/a4/config.yaml train.train_iters=20000

Takes checkpoints of any layout, and models that tools/convert_from_hf.py has imported. One tensor is in memory at a
time. docs/growing.md says what each operator does, where it is from, and what becomes of the optimizer.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from megatron_sgt.cli import number, path, run_main, seed, words
from megatron_sgt.errors import ConfigError
from megatron_sgt.metrics.units import elapsed, file_size, si
from megatron_sgt.stages.operators import OPERATORS
from megatron_sgt.stages.optimizer import MOMENT_RULES


def parse() -> tuple[argparse.Namespace, dict[str, Any]]:
    """Command-line arguments, and of these the options of the operator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--load", type=path, required=True, metavar="CKPT", help="a folder of checkpoints, or one of them"
    )
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="the folder to make")
    summaries = "; ".join(f"{name}: {operator.summary}" for name, operator in OPERATORS.items())
    parser.add_argument("--operator", required=True, choices=OPERATORS, help=summaries)
    parser.add_argument(
        "--moments",
        choices=MOMENT_RULES,
        help="AdamW's moments: " + "; ".join(f"{name}: {what}" for name, what in MOMENT_RULES.items()),
    )
    parser.add_argument(
        "--optimizer",
        type=words,
        metavar="POLICY",
        help="AdamW's step: continue, rewind(N) (to N, kept moments in proportion) or fresh (0, no moments)",
    )
    parser.add_argument(
        "--weights",
        choices=("weights", "ema"),
        default="weights",
        help="what the new model is made of; ema: the average that train.ema_decay keeps [%(default)s]",
    )
    parser.add_argument("--seed", type=seed, metavar="N", help="of new entries [train.seed]")
    options = _add_options(parser.add_argument_group("options of operators"))
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
    return args, given


def _add_options(group: Any) -> list[str]:
    """One flag for each option of any operator; returns the options' names."""
    known: dict[str, list[str]] = {}
    for operator in OPERATORS.values():
        for name in operator.Options.model_fields:
            known.setdefault(name, []).append(operator.name)
    for name, operators in known.items():
        field = OPERATORS[operators[0]].Options.model_fields[name]
        flag, text = "--" + name.replace("_", "-"), f"({', '.join(operators)}) {field.description}"
        if field.annotation is float:
            group.add_argument(flag, type=number, metavar="X", help=text)
        else:
            group.add_argument(flag, type=int, metavar="N", help=text)
    return list(known)


def main() -> None:
    """Grow, and say how to go on."""
    args, options = parse()
    operator = OPERATORS[args.operator]
    if foreign := sorted(set(options) - set(operator.Options.model_fields)):
        flags = [f"--{name.replace('_', '-')}" for name in operator.Options.model_fields]
        raise ConfigError(
            f"--{foreign[0].replace('_', '-')}: has no effect with operator {operator.name}, which takes "
            f"{', '.join(flags)}; remove it"
        )
    from megatron_sgt.compat.quiet import quiet_imports

    quiet_imports()
    from megatron_sgt.checkpoint.surgery.offline import grow_checkpoint
    from megatron_sgt.planning.parameters import parameter_count

    start = time.perf_counter()
    done = grow_checkpoint(
        args.load, args.output, operator, options, args.moments, args.optimizer, args.seed, args.weights
    )
    old, new = done.growth.old, done.growth.new
    print(
        f"{operator.name}: {si(parameter_count(old), ' ')} -> {si(parameter_count(new), ' ')} parameters, the function "
        f"{'is preserved' if done.growth.preserves else 'changes'}"
    )
    for name, before in old.model_dump().items():
        if (now := getattr(new, name)) != before:
            print(f"  {name} {before} -> {now}")
    if len(done.growth.layers) > old.num_layers:
        print(f"  copies of layers {' '.join(map(str, done.growth.layers))}")
    print(f"  AdamW goes on from step {done.carried.step:,}, moments {done.carried.moments}")
    for note in done.notes:
        print(f"  {note}")
    print(f"{done.folder}: {file_size(done.num_bytes)} in {elapsed(time.perf_counter() - start)}")
    print(f"continue it: torchrun --nproc-per-node N pretrain_sgt.py --config {done.config_file}")


if __name__ == "__main__":
    run_main(main)
