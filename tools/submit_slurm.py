#!/usr/bin/env python
"""Submit a pretraining run to Slurm. It is checked first; it is started again until it is done.

python tools/submit_slurm.py --config examples/configs/sgt_1.2b.yaml --nodes 4 --partition gpu --time 24:00:00
python tools/submit_slurm.py --config examples/configs/sgt_1.2b.yaml --nodes 4 --dry-run      # shows the script only

Writes config.yaml and job.sbatch into the folder slurm of the run directory, and the logs of the job and of every
rank beside them. Needs pydantic and PyYAML, no torch. docs/multi-node.md explains the script line by line.
exit codes: 0 submitted; 1 Slurm refuses; 2 configuration or usage, 3 data, 4 checkpoint: nothing was submitted
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from megatron_sgt.cli import job_path, path, positive, run_main, sbatch_option, script_path, warn, words
from megatron_sgt.config import Config, load_config
from megatron_sgt.config.loader import repeated
from megatron_sgt.launch.job_environment import script_environment
from megatron_sgt.launch.sbatch import SlurmJob, fit_runtime, sbatch_script
from megatron_sgt.paths import expand_for_job
from megatron_sgt.preflight import check_job
from megatron_sgt.stages.presets import PRESETS, preset_named
from megatron_sgt.submit.job import check_nodes, job_folder, job_name, latest_file, outside_folders, submit, write_job


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=path, required=True, metavar="FILE.yaml", help="the run; see examples/configs")
    add("overrides", type=words, nargs="*", metavar="section.key=value", help="values over those of the file")
    add("--preset", type=words, metavar="NAME", help=f"the file's run by another method: {', '.join(PRESETS)}")
    _resources(add)
    add("--name", type=words, help="of the job; one job of a name runs at a time [the run directory]")
    add(
        "--warn",
        type=positive,
        default=180,
        metavar="SECONDS",
        help="for the last save, before the limit [180]",
    )
    add("--retries", type=int, default=3, metavar="N", help="restarts in a row from the same checkpoint [3]")
    add("--container", type=job_path, metavar="IMAGE", help=".sqsh or docker://... for pyxis, .sif for Apptainer")
    add("--runtime", choices=("pyxis", "apptainer"), help="[what the name of the image says]")
    add(
        "--mount",
        type=script_path,
        action="append",
        default=[],
        metavar="DIR",
        help="more folders for the container; repeatable",
    )
    add("--python", type=job_path, help="interpreter of the ranks [this one; python in a container]")
    add(
        "--env",
        type=words,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for every rank; NAME= leaves one out",
    )
    add("--dry-run", action="store_true", help="check and print the script; write and submit nothing")
    args = parser.parse_intermixed_args()
    if args.retries < 0:
        parser.error(f"--retries must be 0 or more, got {args.retries}")
    if wrong := [entry for entry in args.env if "=" not in entry]:
        parser.error(f"--env must be NAME=VALUE, got {wrong[0]!r}")
    return args


def _resources(add: Callable[..., Any]) -> None:
    """What is asked of Slurm, beside the job's own rules."""
    add("--nodes", type=positive, required=True, metavar="N")
    add("--gpus-per-node", type=positive, default=8, metavar="N", help="one rank each [%(default)s]")
    add("--tasks-per-node", type=positive, default=1, metavar="N", help="ranks, with parallel.device=cpu [1]")
    add("--cpus-per-task", type=positive, default=8, metavar="N", help="[%(default)s]")
    add(
        "--mem",
        type=words,
        metavar="SIZE",
        help="memory of each node, as 480G; 0 is all of it [what the partition gives]",
    )
    add("--exclusive", action="store_true", help="no other jobs on the nodes")
    add("--time", type=words, metavar="D-HH:MM:SS", help="time limit of one start of the job")
    add("--partition", type=words)
    add("--account", type=words)
    add("--qos", type=words)
    add(
        "--sbatch",
        type=sbatch_option,
        action="append",
        default=[],
        metavar="=--OPTION",
        help="any other option of sbatch; repeatable",
    )


def describe(args: argparse.Namespace, config: Config) -> SlurmJob:
    """The job that the arguments ask for."""
    gpus = 0 if config.parallel.device == "cpu" else args.gpus_per_node
    named = {name: getattr(args, name) for name in ("time", "partition", "account", "qos", "mem")}
    options = [f"--{name}={value}" for name, value in named.items() if value]
    container = args.container
    return SlurmJob(
        name=args.name or job_name(config),
        folder=job_folder(config),
        latest=latest_file(config),
        nodes=args.nodes,
        tasks_per_node=gpus or args.tasks_per_node,
        gpus_per_node=gpus,
        environment=script_environment(config, gpus > 0, dict(entry.split("=", 1) for entry in args.env)),
        options=[*options, *(["--exclusive"] if args.exclusive else []), *args.sbatch],
        cpus_per_task=args.cpus_per_task,
        warn_seconds=args.warn,
        retries=args.retries,
        python=args.python or ("python" if container else sys.executable),
        container=container,
        runtime=args.runtime or fit_runtime(container or ""),
        mounts=[*outside_folders(config), *args.mount] if container else [],
    )


def main() -> None:
    """Check, write, submit."""
    args = parse()
    warn(repeated(args.overrides))
    config = load_config(args.config, args.overrides, preset_named(args.preset), expand_for_job)
    job = describe(args, config)
    check_nodes(config, job.nodes, job.tasks_per_node)
    found = check_job(config, job.nodes * job.tasks_per_node, "cuda" if job.gpus_per_node else "cpu")
    for subject, finding in found:
        print(f"{subject:<9} {finding}", file=sys.stderr)
    if args.dry_run:
        print(sbatch_script(job), end="")
        return
    number = submit(write_job(job, config))
    print(f"submitted {number} as {job.name} · its log: {job.folder}/{number}.log · the ranks': {job.folder}/{number}/")


if __name__ == "__main__":
    run_main(main)
