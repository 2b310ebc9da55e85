"""The sbatch script of a run, from a description of the job. Pure: text in, text out.

Options are those of the sbatch and srun manual pages (https://slurm.schedmd.com/sbatch.html), of pyxis
(https://github.com/NVIDIA/pyxis) and of Apptainer.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

CONFIG, SCRIPT = "config.yaml", "job.sbatch"
"""Names in SlurmJob.folder."""

Runtime = Literal["pyxis", "apptainer"]


@dataclass(frozen=True)
class SlurmJob:
    """One run as a Slurm job. Paths are written as given: relative ones start where the job is submitted."""

    name: str
    folder: str
    """What belongs to the job: script, configuration, logs. On a disk that all nodes share."""
    latest: str
    """The file that names the newest checkpoint."""
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    """0: no GPUs are asked for."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of every task; values are shell words. An empty one tells the ranks to leave theirs out."""
    options: Sequence[str] = ()
    """More options of sbatch, as "--partition=gpu"."""
    cpus_per_task: int = 1
    warn_seconds: int = 180
    """Seconds before the time limit in which the run must finish a step and a checkpoint."""
    retries: int = 3
    """Restarts in a row from the same checkpoint."""
    python: str = "python"
    container: str | None = None
    runtime: Runtime = "pyxis"
    mounts: Sequence[str] = ()
    """Folders that the container sees, under the same path."""


def sbatch_script(job: SlurmJob) -> str:
    """The whole script, ready for sbatch."""
    return "\n".join([*_header(job), "", *_variables(job), "", *_BEFORE, *_srun(job), *_after(job)]) + "\n"


def _header(job: SlurmJob) -> list[str]:
    gpus = f" x {job.gpus_per_node} GPUs" if job.gpus_per_node else ""
    nodes = "1 node" if job.nodes == 1 else f"{job.nodes} nodes"
    wanted = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.tasks_per_node}",
        f"--cpus-per-task={job.cpus_per_task}",
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        "--distribution=block:block",
        *job.options,
        f"--output={job.folder.replace('%', '%%')}/%j.log",
        "--open-mode=append",
        f"--signal=USR1@{job.warn_seconds}",
        "--requeue",
        "--dependency=singleton",
    ]
    return [
        "#!/bin/bash",
        f"# {job.name} on {nodes}{gpus}. Written by tools/submit_slurm.py; docs/multi-node.md explains every line.",
        *[f"#SBATCH {shlex.join([option])}" for option in wanted],
    ]


def _variables(job: SlurmJob) -> list[str]:
    return [
        f"job={shlex.quote(job.folder)}",
        f"latest={shlex.quote(job.latest)}",
        f"retries={job.retries}",
        "",
        "# What must be set before Python starts; the rest of their environment the ranks set (docs/multi-node.md).",
        "# What was set when the job was submitted stays.",
        *[f"export {name}=${{{name}:-{value}}}" for name, value in job.environment.items()],
    ]


# The highest exit code of all tasks, which srun returns, is that of a task that srun itself has ended.
_BEFORE = """\
logs=$job/$SLURM_JOB_ID
mkdir -p "$logs"
export FIRST_EXIT=$logs/first_exit # the code of the task that failed first; srun ends the others and returns theirs
rm -f "$FIRST_EXIT"
newest() { echo "$(cat "$latest" 2>/dev/null || echo "the beginning")"; }
newest >>"$job/starts"
task='trap : HUP USR1 TERM; "$@"; code=$?; ((code == 0)) || (set -C; echo $code >"$FIRST_EXIT") 2>/dev/null; exit $code'

echo "$(date +%FT%T) job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST; ranks log to $logs"\
""".splitlines()


def _srun(job: SlurmJob) -> list[str]:
    srun = 'srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK"'
    logs = "${logs//%/%%}" if "%" in job.folder else "$logs"  # in names of files % is a sign of Slurm's
    lines = [f'{srun} --open-mode=append --output="{logs}/rank-%4t.log"']
    inside: list[str] = []
    if job.container and job.runtime == "pyxis":
        mounts = ",".join(f"{folder}:{folder}" for folder in ("$PWD", *job.mounts))
        lines.append(
            f'--container-image={shlex.quote(job.container)} --container-mounts="{mounts}" --container-workdir="$PWD"'
        )
    elif job.container:
        gpus = ["--nv"] if job.gpus_per_node else []
        binds = [f'--bind "{folder}"' for folder in ("$PWD", *job.mounts)]
        inside = ["apptainer", "exec", *gpus, *binds, '--pwd "$PWD"', shlex.quote(job.container)]
    lines.append(" ".join([*inside, 'bash -c "$task" task']))
    lines.append(f'{shlex.quote(job.python)} -m megatron_sgt --config "$job/{CONFIG}"')
    return [" \\\n  ".join(lines)]


def _after(job: SlurmJob) -> list[str]:
    return f"""\
code=$?
((code == 0)) || code=$(cat "$FIRST_EXIT" 2>/dev/null || echo $code)
echo "$(date +%FT%T) exit code $code"

# 0: done. 2, 3, 4: configuration, data, checkpoint: trying again would not help.
# 75: saved on a signal. Anything else: a crash, or a node that died before Slurm has seen it.
case $code in 0 | 2 | 3 | 4) exit $code ;; esac
from=$(newest)
if (($(tail -n $((retries + 1)) "$job/starts" | grep -cFx "$from") > retries)); then
  echo "not started again: $((retries + 1)) starts in a row brought no newer checkpoint than $from"
  rm "$job/starts"
  exit $code
fi
echo "to be started again from $from"
scontrol requeue "$SLURM_JOB_ID" || sbatch "$job/{SCRIPT}"
exit $code""".splitlines()


def fit_runtime(container: str) -> Runtime:
    """The runtime that an image is made for: Apptainer's .sif, else pyxis (.sqsh, or a registry's name)."""
    return "apptainer" if PurePosixPath(container).suffix == ".sif" else "pyxis"
