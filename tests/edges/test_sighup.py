"""A terminal that is gone: SIGHUP saves and leaves with 75, whoever has started the run, and nothing that the run still
wants to say to that terminal keeps it from saving."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.errors import ExitCode
from tests.helpers.attempts import attempt
from tests.helpers.commands import MPI_ENVIRONMENT
from tests.helpers.exhaustive import exhaustive
from tests.helpers.runs import reported, write_tiny_data
from tests.integration.test_launchers import NO_MPI, SCRIPT
from tests.integration.test_stop import Job, deepspeed, endless, to_everyone, to_launcher, torchrun, wait_for_end
from tests.integration.test_stop import wait_for_step as wait_for_job

PATIENCE = 60.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def configured(folder: Path, data: str) -> Path:
    """The file of an endless run in ``folder``/run."""
    file = folder / "run.yaml"
    file.write_text(endless(folder / "run", data).to_yaml())
    return file


def check_saved(run_dir: Path, reason: str) -> None:
    """The newest checkpoint is that of the step after which the run has stopped, and whole."""
    [stop] = reported(run_dir, "stop")
    assert stop["reason"] == reason
    root = run_dir / "checkpoints"
    tag = layout.latest_tag(root)
    assert tag == layout.tag_for(stop["step"])
    manifest.verify_checksums(root / tag)


def test_one_rank_of_two(data: str, tmp_path: Path) -> None:
    with attempt(tmp_path, configured(tmp_path, data), 2) as run:
        run.wait_for_step(tmp_path / "run", 3)
        run.signal(1, signal.SIGHUP)
        assert run.wait([0, 1], PATIENCE) == [ExitCode.SAVED] * 2, run.finished()
    check_saved(tmp_path / "run", "SIGHUP")


def ignore_hang_up(rank: int) -> None:
    """What nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_under_nohup_the_run_goes_on(data: str, tmp_path: Path) -> None:
    with attempt(tmp_path, configured(tmp_path, data), 1, ignore_hang_up) as run:
        run.wait_for_step(tmp_path / "run", 3)
        run.signal(0, signal.SIGHUP)
        run.wait_for_step(tmp_path / "run", 12)
        run.signal(0, signal.SIGTERM)
        assert run.wait([0], PATIENCE) == [ExitCode.SAVED], run.finished()
    check_saved(tmp_path / "run", "SIGTERM")


def mpirun(folder: Path, arguments: list[str]) -> Job:
    job = Job()
    command = ("-c", "import os, sys; os.execvp('mpirun', sys.argv[1:])", "mpirun", "-n", "2", sys.executable)
    job.add(folder, *command, SCRIPT, *arguments, **MPI_ENVIRONMENT)
    return job


def to_the_ranks(job: Job) -> None:
    """As a scheduler does that signals every process of the step but its launcher."""
    me = job.processes[0].pid
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGHUP)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "ask", "codes"),
    [
        exhaustive((torchrun, to_launcher(signal.SIGHUP), [1])),
        exhaustive((deepspeed, to_everyone(signal.SIGHUP), [-signal.SIGHUP])),
        pytest.param(mpirun, to_the_ranks, [ExitCode.SAVED], marks=[pytest.mark.exhaustive, NO_MPI]),
    ],
)
def test_under_launchers(
    launch: Callable[[Path, list[str]], Job], ask: Callable[[Job], None], codes: list[int], data: str, tmp_path: Path
) -> None:
    """In `make test` tests/integration/test_stop.py asks all of them, by other signals."""
    job = launch(tmp_path, ["--config", str(configured(tmp_path, data))])
    wait_for_job(tmp_path / "run", job)
    ask(job)
    assert job.end() == codes, "".join(path.read_text() for path in sorted(tmp_path.glob("log*")))
    wait_for_end(tmp_path / "run")
    check_saved(tmp_path / "run", "SIGHUP")


def take_terminal(name: str, rank: int) -> None:
    """Make the terminal ``name`` that of this process, and its stdin, stdout and stderr, as ssh and a shell do."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in (0, 1, 2):
        os.dup2(terminal, number)
    # As Python opens them at its start: a stream remembers whether its file could seek.
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115


def test_the_terminal_is_closed(data: str, tmp_path: Path) -> None:
    """The kernel sends the signal; every later write to the terminal fails with EIO."""
    ours, theirs = pty.openpty()
    reader = threading.Thread(target=drain, args=(ours, gone := threading.Event()))
    reader.start()
    with attempt(tmp_path, configured(tmp_path, data), 1, partial(take_terminal, os.ttyname(theirs))) as run:
        run.wait_for_step(tmp_path / "run", 3)
        os.close(theirs)
        gone.set()
        reader.join()
        assert run.wait([0], PATIENCE) == [ExitCode.SAVED], run.finished()
    check_saved(tmp_path / "run", "SIGHUP")


def drain(terminal: int, gone: threading.Event) -> None:
    """Read what is shown, then close the terminal."""
    os.set_blocking(terminal, False)
    while not gone.wait(0.02):
        with suppress(BlockingIOError):
            os.read(terminal, 1 << 16)
    os.close(terminal)
