"""The job that a process belongs to, and whether a Slurm job still runs. Answers are bounded in time."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

ANSWER_SECONDS = 10.0
"""How long Slurm's controller has to answer."""
_RUNS = {"RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT", "R", "S", "ST", "SI", "RS", "SO"}
# A job that is being ended may still save: COMPLETING is no answer. One that waits again has no processes.
_OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "CONFIGURING", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PENDING", "PREEMPTED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "REVOKED", "SPECIAL_EXIT", "TIMEOUT",
    "BF", "CA", "CD", "CF", "DL", "F", "NF", "OOM", "PD", "PR", "RQ", "RF", "RH", "RV", "SE", "TO",
}  # fmt: skip
SPECIAL_STEPS = 0xFFFFFFF0
"""Step ids from here on are no srun step: the batch script, the interactive shell of salloc, ..."""


@dataclass(frozen=True)
class Job:
    """A scheduler's job. ``restarts``: how often Slurm has requeued it; ``step``: of srun, "" outside of one."""

    kind: str
    id: str
    step: str = ""
    restarts: int = 0
    cluster: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind} job {self.id}"

    def is_over(self, own: Job | None) -> bool | None:
        """Whether no process of this job's holder can be left; None: nobody says.

        Args:
            own: the job of the one who asks.
        """
        if self.kind != "Slurm" or (own is not None and own.kind == "Slurm" and own.cluster != self.cluster):
            return None
        if own is None or own.id != self.id:
            over = job_is_over(self.id)
            if over and own is None and self.cluster:  # another cluster's controller may have been asked
                return None
            return step_is_over(self.id, self.step) or False if over is False else over
        if own.restarts != self.restarts:  # requeued only when all of its processes were gone
            return True if own.restarts > self.restarts else None
        return None if own.step == self.step else step_is_over(self.id, self.step)


def own_job(environ: Mapping[str, str] = os.environ) -> Job | None:
    """The job of this process, from its scheduler's variables."""
    if job := environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID"):
        step, restarts = environ.get("SLURM_STEP_ID", ""), environ.get("SLURM_RESTART_COUNT", "")
        if not step.isdigit() or int(step) >= SPECIAL_STEPS:
            step = ""
        cluster = environ.get("SLURM_CLUSTER_NAME", "")
        return Job("Slurm", job, step, int(restarts) if restarts.isdigit() else 0, cluster)
    for kind, name in (("PBS", "PBS_JOBID"), ("LSF", "LSB_JOBID")):
        if job := environ.get(name):
            return Job(kind, job)
    return None


def job_is_over(job: str) -> bool | None:
    """Whether the Slurm job has ended or waits in the queue again; None without an answer.

    A job that Slurm does not know is no answer: it forgets an ended one after minutes, but another controller than the
    one that is asked here may run it.
    """
    if not re.fullmatch(r"[\w.+\[\]-]+", job) or job.startswith("-"):  # of a lease that somebody has edited
        return None
    if shutil.which("squeue"):
        said = _answer(["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"])
    else:
        said = _answer(["scontrol", "--oneliner", "show", "job", job])
        said = said and " ".join(re.findall(r"JobState=(\w+)", said))
    states = set(re.findall(r"\b[A-Z_]+\b", said or ""))
    if states & _RUNS:
        return False
    return True if states and states <= _OVER else None


def step_is_over(job: str, step: str) -> bool | None:
    """Whether a running job has steps, but this one no more; None without an answer."""
    if not step:
        return None
    listed = _answer(["squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i"])
    steps = re.findall(r"^\s*\d[\w\[\]+]*\.(\w+)\s*$", listed or "", re.MULTILINE)
    return step not in steps if steps else None


def _answer(command: list[str]) -> str | None:
    """What Slurm says; None where it does not answer, or complains."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError:
        return None
    with process:
        try:
            out, _ = process.communicate(timeout=ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):  # with all that it has started
                os.killpg(process.pid, signal.SIGKILL)
            return None
    return out.strip() if process.returncode == 0 else None
