"""What Slurm says of a holder's job; how long it may take to say it."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest

from megatron_sgt.lease import scheduler
from megatron_sgt.lease.scheduler import Job, job_is_over, own_job, step_is_over


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs in front of the PATH; ``say`` puts Slurm's there."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def say(folder: Path, text: str, program: str = "squeue") -> None:
    (folder / program).write_text(f"#!/bin/bash\n{text}\n")
    (folder / program).chmod(0o755)


@pytest.mark.parametrize(
    ("text", "over"),
    [
        ("echo RUNNING", False),
        ("echo SUSPENDED", False),
        ("printf 'PENDING\\nRUNNING\\n'", False),  # of a heterogeneous job
        ("echo PENDING", True),
        ("printf 'COMPLETED\\nCANCELLED\\n'", True),
        ("true", None),  # forgotten, or another controller's
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", None),
        ("echo COMPLETING", None),  # may be saving
        ("echo 'Unable to contact slurm controller' >&2; exit 1", None),
        ("echo NEW_STATE", None),
        ("sleep 60", None),
        ("sleep 60 & wait", None),
    ],
)
def test_a_job(text: str, over: bool | None, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "ANSWER_SECONDS", 0.5)
    say(slurm, text)
    begun = time.monotonic()
    assert job_is_over("7") is over
    assert time.monotonic() - begun < 3


def test_without_squeue_scontrol_is_asked_and_without_both_nobody(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler.shutil, "which", lambda name: None)
    say(slurm, "echo 'JobId=7 JobName=FAILED JobState=RUNNING Reason=None'", "scontrol")
    assert job_is_over("7") is False
    say(slurm, "echo 'JobId=7 JobName=RUNNING JobState=TIMEOUT Reason=None'", "scontrol")
    assert job_is_over("7") is True
    say(slurm, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "scontrol")
    assert job_is_over("7") is None
    monkeypatch.setenv("PATH", str(slurm / "nothing"))
    assert job_is_over("7") is None


def test_a_job_that_somebody_has_written_into_a_lease_is_no_option_of_a_command(slurm: Path) -> None:
    say(slurm, f"touch {slurm}/called")
    for job in ("--help", "7 8", "7;8", "", "-1"):
        assert job_is_over(job) is None
    assert not (slurm / "called").exists()


@pytest.mark.parametrize(
    ("text", "over"),
    [("printf '7.0\\n7.batch\\n'", True), ("printf '7.0\\n7.2\\n'", False), ("true", None), ("exit 1", None),
     ("echo RUNNING", None), ("printf '5_7.2\\n'", False)],
)  # fmt: skip
def test_a_step(text: str, over: bool | None, slurm: Path) -> None:
    say(slurm, text)
    assert step_is_over("7", "2") is over
    assert step_is_over("7", "") is None


def test_whose_job(slurm: Path) -> None:
    say(slurm, 'case "$*" in *steps*) echo 7.0;; *) echo RUNNING;; esac')
    there, other = Job("Slurm", "7", "2"), Job("Slurm", "8", "0")
    assert there.is_over(other) is True, "the job runs on, without that step"
    assert dataclasses.replace(there, step="0").is_over(other) is False
    assert dataclasses.replace(there, step="").is_over(None) is False
    assert there.is_over(dataclasses.replace(there, restarts=1)) is True, "requeued"
    assert dataclasses.replace(there, restarts=1).is_over(there) is None, "an older start asks after a later one"
    assert there.is_over(there) is None, "one step: torchrun has moved rank 0"
    assert there.is_over(dataclasses.replace(there, step="0")) is True, "srun again in one job"
    assert dataclasses.replace(there, cluster="a").is_over(dataclasses.replace(other, cluster="b")) is None
    say(slurm, "echo COMPLETED")
    assert dataclasses.replace(there, cluster="a").is_over(None) is None, "perhaps another controller was asked"
    assert there.is_over(None) is True
    assert Job("PBS", "7").is_over(other) is None


def test_the_own_job() -> None:
    assert own_job({}) is None
    environ = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3", "SLURM_RESTART_COUNT": "2", "SLURM_CLUSTER_NAME": "c"}
    assert own_job(environ) == Job("Slurm", "7", "3", 2, "c")
    assert own_job({"SLURM_JOBID": "7", "SLURM_STEP_ID": "4294967291"}) == Job("Slurm", "7")
    assert own_job({"PBS_JOBID": "7.server"}) == Job("PBS", "7.server")
