"""The job script: what it asks of Slurm, and what it does with every exit code (run with a false srun)."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sgt.launch.sbatch import SlurmJob, fit_runtime, sbatch_script

Start = Callable[..., tuple[int, str]]

JOB = SlurmJob(
    name="sgt:runs/a",
    folder="runs/a/slurm",
    latest="runs/a/checkpoints/latest",
    nodes=2,
    tasks_per_node=8,
    gpus_per_node=8,
    environment={"NCCL_DEBUG": "WARN"},
    options=["--partition=gpu", "--comment=two words"],
    cpus_per_task=4,
    retries=2,
)

SRUN = """\
#!/bin/bash
echo "$@" >srun.arguments
[ -n "$NCCL_DEBUG" ] && echo "$NCCL_DEBUG" >srun.environment || echo "${NCCL_DEBUG+set to []}" >srun.environment
if [ -e next ]; then mkdir -p runs/a/checkpoints; mv next runs/a/checkpoints/latest; fi
while [ "$1" != bash ]; do shift; done
"$1" "$2" "$3" "$4" sh -c "exit $(cat task.code)"
exit $(cat srun.code)
"""


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Runs the script once: the first task ends with `task`, srun with `srun`; returns (exit code, output)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (
        ("srun", SRUN),
        ("scontrol", "#!/bin/bash\necho scontrol $@\n"),
        ("sbatch", "#!/bin/bash\necho sbatch $@\n"),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "4",
    }

    def run(task: int, srun: int, job: SlurmJob = JOB, **more: str) -> tuple[int, str]:
        (tmp_path / "task.code").write_text(str(task))
        (tmp_path / "srun.code").write_text(str(srun))
        done = subprocess.run(
            ["bash", "-c", sbatch_script(job)],
            cwd=tmp_path,
            env=environment | more,
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""
        return done.returncode, done.stdout

    return run


def test_what_slurm_is_asked_for() -> None:
    lines = sbatch_script(JOB).splitlines()
    assert lines[0] == "#!/bin/bash"
    assert [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")] == [
        "--job-name=sgt:runs/a",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--cpus-per-task=4",
        "--gpus-per-node=8",
        "--distribution=block:block",
        "--partition=gpu",
        "'--comment=two words'",
        "--output=runs/a/slurm/%j.log",
        "--open-mode=append",
        "--signal=USR1@180",
        "--requeue",
        "--dependency=singleton",
    ]
    assert not any("ssh" in line or "--array" in line or "hostfile" in line for line in lines)


@pytest.mark.parametrize("code", [0, 2, 3, 4])
def test_done_and_the_users_mistakes_end_the_job(start: Start, code: int) -> None:
    assert start(code, code)[0] == code
    ended, out = start(code, 137 if code else 0)
    assert ended == code, "the first task's code, not that of the tasks that srun ended"
    assert "scontrol" not in out and "sbatch" not in out


@pytest.mark.parametrize("code", [75, 1, 137])
def test_everything_else_is_started_again(start: Start, code: int) -> None:
    ended, out = start(code, 143)
    assert ended == code
    assert out.splitlines()[-2:] == ["to be started again from the beginning", "scontrol requeue 7"]


def test_a_job_that_slurm_does_not_requeue_is_submitted_again(start: Start, tmp_path: Path) -> None:
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/bash\nexit 1\n")
    assert start(75, 75)[1].endswith("sbatch runs/a/slurm/job.sbatch\n")


def test_starts_without_a_newer_checkpoint_are_counted(start: Start, tmp_path: Path) -> None:
    def is_started_again(step: int, retries: int = 2) -> bool:
        """After a start that saves `step`, or finds it and saves nothing."""
        (tmp_path / "next").write_text(f"global_step{step}")  # as checkpoints have it, without a newline
        return "scontrol requeue" in start(1, 1, replace(JOB, retries=retries))[1]

    assert [is_started_again(10) for _ in range(4)] == [True, True, True, False], "the first one brought step 10"
    assert [is_started_again(10) for _ in range(3)] == [True, True, False], "giving up forgets"
    assert [is_started_again(step) for step in (20, 20, 30, 30, 30, 30)] == [True] * 5 + [False]
    assert [is_started_again(step, retries=0) for step in (40, 50, 50)] == [True, True, False]


def test_ranks_get_the_environment_and_logs_of_their_own(start: Start, tmp_path: Path) -> None:
    start(0, 0)
    assert (tmp_path / "srun.environment").read_text() == "WARN\n"
    arguments = (tmp_path / "srun.arguments").read_text()
    assert "--kill-on-bad-exit=1" in arguments and "--output=runs/a/slurm/7/rank-%4t.log" in arguments
    assert arguments.endswith("task python -m megatron_sgt --config runs/a/slurm/config.yaml\n")
    start(0, 0, NCCL_DEBUG="INFO")
    assert (tmp_path / "srun.environment").read_text() == "INFO\n", "what the user set stays"
    start(0, 0, replace(JOB, environment={"NCCL_DEBUG": ""}))
    assert (tmp_path / "srun.environment").read_text() == "set to []\n", "the ranks are told to leave it out"


@pytest.mark.parametrize("image", ["image.sif", "image.sqsh", "docker://nvcr.io#nvidia/pytorch:25.01-py3"])
def test_containers(start: Start, tmp_path: Path, image: str) -> None:
    job = replace(JOB, container=image, runtime=fit_runtime(image), mounts=["/data"])
    assert start(0, 0, job)[0] == 0
    arguments = (tmp_path / "srun.arguments").read_text()
    if job.runtime == "apptainer":
        assert f"apptainer exec --nv --bind {tmp_path} --bind /data --pwd {tmp_path} {image} bash -c" in arguments
    else:
        assert f"--container-image={image} --container-mounts={tmp_path}:{tmp_path},/data:/data" in arguments


def test_the_false_srun_starts_what_stands_behind_bash(start: Start) -> None:
    assert start(0, 9)[0] == 9, "without a failed task srun's own code counts"
