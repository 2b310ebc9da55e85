"""The command line behind pretrain_sgt.py."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from megatron_sgt.cli import INTERRUPTED
from megatron_sgt.config import Config, load_config
from megatron_sgt.config.hints import unknown_key
from megatron_sgt.errors import ConfigError, SGTError
from megatron_sgt.launch.environment import RankInfo, discover

_EPILOG = """\
start it
  alone          python pretrain_sgt.py --config FILE.yaml
  torchrun       torchrun --nproc-per-node 8 pretrain_sgt.py --config FILE.yaml
  DeepSpeed      deepspeed --num_gpus 8 pretrain_sgt.py --config FILE.yaml
  Slurm          srun python pretrain_sgt.py --config FILE.yaml      (one task per GPU)
  MPI            mpirun -n 8 python pretrain_sgt.py --config FILE.yaml

exit codes: 0 done, 1 crash or divergence, 2 configuration or usage, 3 data, 4 checkpoint
"""


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError for a wrong command line, so that it is told once, whatever the number of ranks."""

    def error(self, message: str) -> NoReturn:
        """See argparse. Settings given in another project's style (--num-layers 4) are named in ours."""
        prefix = "unrecognized arguments: "
        words = message.removeprefix(prefix).split() if message.startswith(prefix) else []
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        hints = ["settings are given as section.key=value, without dashes"] if flags else []
        hints += [unknown_key(Config, (flag,)) for flag in flags]
        raise ConfigError("\n  ".join([message, *hints]) + f"\n{self.format_usage().rstrip()}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = _Parser(
        prog="pretrain_sgt.py",
        description="Pretrain a Sparse Growing Transformer (or its vanilla twin).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE.yaml", help="the run; see examples/configs"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values over those of the file"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and exit"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the run's shape and exit"
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="ranks that --dry-run assumes (default: those it runs on)"
    )
    # The deepspeed launcher adds this one; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code. A user's mistake is told once, whatever the number of ranks."""
    info: RankInfo | None = None
    try:
        args = parse(arguments)
        info = discover()
        config = load_config(args.config, args.overrides)
        if args.print_config:
            if info.rank == 0:
                print(config.to_yaml(), end="")
        elif args.dry_run:
            if info.rank == 0:
                _dry_run(config, info, args.world_size)
        else:
            _train(config, info)
    except SGTError as error:
        if _speaks(error, info or _place()):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return _leave(error.exit_code)
    except KeyboardInterrupt:
        if info is None or info.rank == 0:
            print("interrupted: the steps since the newest checkpoint are lost", file=sys.stderr)
        return _leave(INTERRUPTED)
    except Exception:
        rank = "" if info is None or info.world_size == 1 else f"[rank {info.rank}] "
        print(f"{rank}{traceback.format_exc()}", file=sys.stderr, flush=True)
        return _leave(1)
    return 0


def _dry_run(config: Config, info: RankInfo, world_size: int | None) -> None:
    from megatron_sgt.engine.dry_run import dry_run

    if world_size is not None and world_size < 1:
        raise ConfigError(f"--world-size: must be above 0, got {world_size}")
    assumed = world_size is None and info.launcher == "single"
    smallest = config.parallel.tensor_model_parallel_size
    print(dry_run(config, world_size or max(info.world_size, smallest if assumed else 1), assumed))


def _train(config: Config, info: RankInfo) -> None:
    from megatron_sgt.engine.run import PretrainingRun
    from megatron_sgt.parallel.groups import destroy_groups

    PretrainingRun(config, info).train()
    destroy_groups()


def _place() -> RankInfo | None:
    """This process's place, None where that is what went wrong."""
    try:
        return discover()
    except SGTError:
        return None


def _speaks(error: SGTError, info: RankInfo | None) -> bool:
    """Whether this rank tells the error: the first to meet it.

    Before the ranks know each other, rank 0 does; of files, which may be missing on one node only, the first
    rank of every node.
    """
    if info is None or info.world_size == 1:
        return True
    dist = getattr(sys.modules.get("torch"), "distributed", None)
    if dist is not None and dist.is_initialized():
        try:
            store = dist.distributed_c10d._get_default_store()
            return store.add("sgt/error_told", 1) == 1
        except RuntimeError:  # the store's host is gone, and has told the cause
            return False
    return info.rank == 0 or (info.local_rank == 0 and not isinstance(error, ConfigError))


def _leave(code: int) -> int:
    """Leave at once where peers may be waiting in a collective: their launcher ends them when we are gone."""
    if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        sys.stdout.flush()
        os._exit(code)
    return code
