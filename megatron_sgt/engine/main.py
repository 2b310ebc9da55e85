"""The command line behind pretrain_sgt.py."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from megatron_sgt import __version__, streams
from megatron_sgt.cli import path, warn, words
from megatron_sgt.config import Config, load_config
from megatron_sgt.config.hints import all_keys, unknown_key
from megatron_sgt.config.loader import repeated
from megatron_sgt.engine.prepare import prepare_process
from megatron_sgt.errors import ConfigError, ExitCode, of_full_disk
from megatron_sgt.guard.ending import place, run_rank
from megatron_sgt.guard.save_now import ask_to_save
from megatron_sgt.guard.signals import listening
from megatron_sgt.guard.stop import StopRequests
from megatron_sgt.launch.environment import RankInfo
from megatron_sgt.launch.slurm import job_end
from megatron_sgt.stages.presets import PRESETS, preset_named

_EPILOG = """\
start it
  alone          python pretrain_sgt.py --config FILE.yaml
  torchrun       torchrun --nproc-per-node 8 pretrain_sgt.py --config FILE.yaml
  DeepSpeed      deepspeed --num_gpus 8 pretrain_sgt.py --config FILE.yaml
  Slurm          srun -K python pretrain_sgt.py --config FILE.yaml   (one task per GPU)
  MPI            mpirun -n 8 python pretrain_sgt.py --config FILE.yaml

stop it
  SIGTERM, SIGUSR1, Ctrl-C or SIGHUP (a closed terminal; not under nohup) to any rank: all ranks end the step, save,
  and leave with 75. The same signal again, more than 3 s later, forces the exit. Under Slurm the run stops by itself
  before the job's end.

save now and go on
  --save-now with the same --config, on any machine that sees the run's folder, or touch RUN_DIR/save_now: the run
  saves after its next step.

exit codes (torchrun ends with 1 whatever its ranks end with)
""" + "".join(f"  {code:<4} {code.meaning}\n" for code in ExitCode)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as ConfigError, so that it is printed once, whatever the number of ranks."""

    def error(self, message: str) -> NoReturn:
        """See argparse. For settings in another project's style (--num-layers 4) the message names ours."""
        prefix = "unrecognized arguments: "
        words = message.removeprefix(prefix).split() if message.startswith(prefix) else []
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        hints = ["settings are given as section.key=value, without dashes"] if flags else []
        hints += [_meant(flag) for flag in flags]
        raise ConfigError("\n  ".join([message, *hints]) + f"\n{self.format_usage().rstrip()}")


def _meant(flag: str) -> str:
    """The setting that ``flag`` (--num-layers, --model.num-layers) was probably to set."""
    name = flag.lstrip("-").replace("-", "_")
    if name in all_keys(Config):
        return f"write {name}=... for {flag}"
    return unknown_key(Config, tuple(name.split(".")) if "." in name else (flag,))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = _Parser(
        prog="pretrain_sgt.py",
        description="Pretrain a Sparse Growing Transformer (or its vanilla twin).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=path, required=True, metavar="FILE.yaml", help="the run; see examples/configs")
    parser.add_argument(
        "overrides", type=words, nargs="*", metavar="section.key=value", help="values over those of the file"
    )
    parser.add_argument(
        "--preset", type=words, metavar="NAME", help=f"the file's run by another method: {', '.join(PRESETS)}"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the run's shape and exit")
    parser.add_argument(
        "--save-now", action="store_true", help="ask the running job of this configuration to save and go on"
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="ranks that --dry-run assumes (default: those it runs on)"
    )
    # The deepspeed launcher adds this one; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit code. A user's mistake is reported once, whatever the number of ranks."""
    streams.make_readable()
    return run_rank(lambda: _main(parse(arguments)))


def _main(args: argparse.Namespace) -> int:
    info = place()
    config = load_config(args.config, args.overrides, preset_named(args.preset))
    if info.rank == 0:
        warn(repeated(args.overrides))
    if args.print_config:
        if info.rank == 0:
            return _show(config.to_yaml())
    elif args.save_now:
        if info.rank == 0:
            return _show(ask_to_save(Path(config.logging.run_dir)) + "\n")
    elif args.dry_run:
        if info.rank == 0:
            return _show(_dry_run(config, info, args.world_size) + "\n")
    else:
        stop = StopRequests(config.train, job_end(os.environ))
        with listening(stop, config.train.exit_grace_seconds):
            return _train(config, info, stop)
    return ExitCode.DONE


def _show(text: str) -> ExitCode:
    """Print what the command was asked for: without it the command has failed."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        streams.discard(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return ExitCode.BROKEN_PIPE
        raise of_full_disk(error) or error from error
    return ExitCode.DONE


def _dry_run(config: Config, info: RankInfo, world_size: int | None) -> str:
    from megatron_sgt.engine.dry_run import dry_run

    if world_size is not None and world_size < 1:
        raise ConfigError(f"--world-size: must be above 0, got {world_size}")
    assumed = world_size is None and info.launcher == "single"
    smallest = config.parallel.model_parallel_size
    return dry_run(config, world_size or max(info.world_size, smallest if assumed else 1), assumed)


def _train(config: Config, info: RankInfo, stop: StopRequests) -> int:
    streams.outlive_full_disks()
    try:
        return _train_and_report(config, info, stop)
    finally:
        streams.report_losses()


def _train_and_report(config: Config, info: RankInfo, stop: StopRequests) -> int:
    if info.rank == 0:  # a sign of life: the imports that follow take seconds
        ranks = "1 rank" if info.world_size == 1 else f"{info.world_size} ranks"
        launcher = "alone" if info.launcher == "single" else f"started by {info.launcher}"
        print(f"megatron_sgt {__version__}: {ranks}, {launcher}", flush=True)
    prepare_process(config, info)  # before the imports, which read the environment
    from megatron_sgt.engine.run import PretrainingRun
    from megatron_sgt.guard import Watch
    from megatron_sgt.parallel.groups import destroy_groups

    with Watch(config, info) as watch:
        code = PretrainingRun(config, info, stop, watch).train()
    destroy_groups()
    return code
