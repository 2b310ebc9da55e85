#!/usr/bin/env python
"""Train presets x seeds from one configuration, then write the table that compares them.

The paper's comparison; or with --growing the ways to one final model at equal FLOPs: from scratch, by models that
become deeper or wider while they train, by SGT.

Runs resume where they were stopped, so that a study can be made in slices: call it again until it says that it is
complete. table.md (perplexity, FLOPs) is reproducible; times.md is what this machine took.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from study_parts.contenders import GROWING, PAPER, Contender, Study
from study_parts.results import markdown, outcome_of, times_markdown
from study_parts.runner import Job, run_jobs

from megatron_sgt.cli import number, path, positive, run_main, warn, words
from megatron_sgt.config import Config, load_config
from megatron_sgt.config.loader import repeated
from megatron_sgt.errors import ConfigError
from megatron_sgt.preflight import with_vocabulary
from megatron_sgt.stages.presets import preset_named

SCRIPT = Path(__file__).resolve().parents[1] / "pretrain_sgt.py"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=path, required=True, metavar="FILE.yaml", help="the run to vary")
    parser.add_argument(
        "overrides", type=words, nargs="*", metavar="section.key=value", help="values over those of the file"
    )
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="folder of all runs and tables")
    parser.add_argument("--growing", action="store_true", help="compare ways to grow, at the FLOPs of the file's run")
    shown = f"default: {', '.join(PAPER.presets)}; with --growing: {', '.join(GROWING.presets)}"
    parser.add_argument("--presets", type=words, metavar="A,B,...", help=f"[{shown}]")
    parser.add_argument("--seeds", type=positive, default=2, metavar="N", help="seeds 1 to N [%(default)s]")
    parser.add_argument("--at-once", type=positive, default=1, metavar="N", help="runs side by side [%(default)s]")
    parser.add_argument("--minutes", type=number, metavar="M", help="stop (saving) after so long; default: to the end")
    parser.add_argument("--ranks", type=positive, default=1, metavar="N", help="ranks of one run [%(default)s]")
    return parser.parse_intermixed_args()


def load(args: argparse.Namespace, preset: str, settings: Iterable[str]) -> Config:
    """The configuration of one run: the file's, under a preset, with the command line's overrides and ``settings``.

    Raises:
        ConfigError: something is wrong with it.
    """
    return load_config(args.config, [*args.overrides, *settings], preset_named(preset))


def jobs_of(contenders: list[Contender], args: argparse.Namespace) -> list[Job]:
    """The runs, seed by seed, so that early slices give whole comparisons.

    Raises:
        ConfigError: the settings of a run are wrong.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    jobs = []
    for seed in range(1, args.seeds + 1):
        for one in contenders:
            run_dir = args.output / f"{one.preset}-seed{seed}"
            settings = [
                *one.settings,
                f"train.seed={seed}",
                f"growth.seed={seed}",
                f"logging.run_dir={json.dumps(str(run_dir), ensure_ascii=False)}",  # in quotes: a name may be a number
            ]
            config = load(args, one.preset, settings)
            if not config.train.eval_interval:
                raise ConfigError("a study compares validation losses: set train.eval_interval")
            command = [sys.executable, *(launcher if args.ranks > 1 else []), str(SCRIPT)]
            command += ["--config", str(args.config), "--preset", one.preset, *args.overrides, *settings]
            jobs.append(Job(one.preset, seed, run_dir, tuple(command)))
    return jobs


def describe(study: Study, config: Config, seeds: int) -> str:
    """One sentence on what was trained."""
    model, train = config.model, config.train
    tokens = config.tokens_between(1, train.train_iters)
    sizes = sorted({span.size for span in config.batches.spans})
    sequences = " to ".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
    return (
        f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads, "
        f"T = {model.seq_length}; {train.train_iters:,} steps of {sequences} sequences, {tokens:,} "
        f"tokens{study.terms.format(seeds=seeds)}"
    )


def main() -> int:
    """Run a slice, write the tables of what is finished, say whether anything is left."""
    args = arguments()
    warn(repeated(args.overrides))
    study = GROWING if args.growing else PAPER
    presets = study.presets if args.presets is None else tuple(args.presets.split(","))
    contenders = study.contenders(lambda preset, more: with_vocabulary(load(args, preset, more)), presets)
    jobs = jobs_of(contenders, args)
    left = run_jobs(jobs, args.at_once, None if args.minutes is None else 60 * args.minutes, print)
    found = [outcome_of(job.run_dir, job.preset, job.seed) for job in jobs]
    outcomes = [outcome for outcome in found if outcome is not None]
    note = describe(study, load_config(args.config, args.overrides), args.seeds)
    trains = {one.preset: one.trains for one in contenders} if study.equal_flops else None
    page = markdown(outcomes, note, study.claims, trains)
    shared = "one run at a time" if args.at_once == 1 else f"{args.at_once} runs side by side, which disturb each other"
    (args.output / "table.md").write_text(page, encoding="utf-8")
    times = times_markdown(outcomes, f"Median of the last half of the steps; {shared}.")
    (args.output / "times.md").write_text(times, encoding="utf-8")
    first = [job.run_dir for job in jobs if job.seed == 1 and job.finished]
    if len(first) > 1:
        from megatron_sgt.reporting.compare import write_comparison

        write_comparison(first, args.output / "compare", [job.preset for job in jobs if job.run_dir in first])
    print(page)
    state = "complete" if not left else f"{len(left)} of {len(jobs)} runs are not finished; call it again to go on"
    print(f"{args.output / 'table.md'}: {state}")
    return 0


if __name__ == "__main__":
    run_main(main)
