"""Runs the commands of a page, one after the other, as its reader would."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from tests.helpers.attempts import Attempt
from tests.helpers.commands import Finished, run_script, without_launcher
from tests.helpers.ranks import SHARED_MEMORY
from tests.helpers.shared_memory import register

TIMEOUT = 900.0
_CONTINUED = re.compile(r"\\\n\s*")
_OURS = re.compile(r"python (?P<script>\S+\.py)|torchrun --standalone --nproc-per-node (?P<ranks>\d+) pretrain_sgt\.py")


def in_one_shell(script: str, place: Path) -> str:
    """The output of ``script`` in a shell that leaves at the first error; AssertionError there."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-x", "-c", f"set -euo pipefail\n{script}"],
        cwd=place,
        env={**without_launcher(), "PATH": path, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def in_forks(script: str, place: Path) -> str:
    """As ``in_one_shell``, but the project's own scripts are forks that need not import the libraries.

    A command imports for longer than it works. torchrun is left out too: its ranks are forks with the variables that
    it would export, and they talk through shared memory.
    """
    said, others = "", ""
    for line in [*_CONTINUED.sub(" ", script).splitlines(), None]:
        ours = _OURS.match(line) if line else None
        if line is not None and not ours:
            others += f"{line}\n"
            continue
        if others.strip():
            said += in_one_shell(others, place)
        others = ""
        if line is not None and ours:
            words = shlex.split(line[ours.end() :], comments=True)
            done = _ranks(int(ours["ranks"]), words, place) if ours["ranks"] else _alone(ours["script"], words, place)
            for finished in done:
                assert finished.code == 0, f"{line}\n{(finished.out + finished.err)[-6000:]}"
                said += finished.out
    return said


def _alone(script: str, words: list[str], place: Path) -> list[Finished]:
    return [run_script(script, words, place, timeout=TIMEOUT)]


def _share_memory(folder: Path, _: int) -> None:
    from megatron_sgt.parallel import groups

    register(folder)
    groups.backend_for = lambda device: SHARED_MEMORY


def _ranks(count: int, words: list[str], place: Path) -> list[Finished]:
    folder = Path(tempfile.mkdtemp(dir=place))
    # Shared memory knows collectives alone, and a pipeline sends messages.
    sends = any("pipeline" in word for word in words)
    started = Attempt(folder, words, count, None if sends else partial(_share_memory, folder), place)
    try:
        started.wait(list(range(count)), TIMEOUT)
        return started.finished()
    finally:
        started.end()
