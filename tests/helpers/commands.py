"""The project's command lines as a user starts them: as processes of their own, or as forks of one that has
imported the libraries already (a tenth of the time; the same script, arguments, streams and exit code)."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.ranks import start_server

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
REQUIRED = bool(os.environ.get("REQUIRE_LAUNCHERS"))
"""Whether a machine without Slurm or MPI fails the tests of them, as in .ci/run, instead of skipping these."""
MPI_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
"""Open MPI starts nothing as root, and no more ranks than there are cores, unless told to."""
LAUNCHER_VARIABLES = (
    "SLURM",
    "SBATCH",
    "OMPI_",
    "PMI_",
    "MPI_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "TORCHELASTIC_",
)
"""How the names of what launchers leave in the environment begin."""
HANG = -1
"""Exit code of a command that had to be killed."""

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


def without_launcher() -> dict[str, str]:
    """The environment of a shell that no launcher has started."""
    return {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}


def run_process(command: list[str], cwd: Path, timeout: float = 180.0) -> Finished:
    """Run ``command`` as a process of its own."""
    done = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def run_script(
    script: str,
    arguments: list[str],
    cwd: Path,
    before: Callable[[], None] | None = None,
    timeout: float = 180.0,
) -> Finished:
    """Run ``script`` (relative to the repository) in a fork, as ``python script arguments`` in ``cwd``.

    ``before``: called in the fork first; a function that can be pickled.
    """
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _context.Process(
            target=_script_main, args=(str(ROOT / script), arguments, str(cwd), str(out), str(err), before)
        )
        process.start()
        process.join(timeout)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
            code = HANG
        return Finished(code, out.read_text(errors="replace"), err.read_text(errors="replace"))


def run_here(script: str, arguments: list[str], cwd: Path) -> Finished:
    """Run ``script`` (relative to the repository) in this very process: for those that import much and change
    nothing outside their files."""
    out, err, before, where = io.StringIO(), io.StringIO(), sys.argv, os.getcwd()
    os.chdir(cwd)
    sys.argv = [str(ROOT / script), *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    finally:
        sys.argv = before
        os.chdir(where)
    return Finished(code, out.getvalue(), err.getvalue())


def limit_file_size() -> None:
    """Let every write beyond 100 kB into a file fail, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def no_mpi() -> bool:
    """Whether tests with mpirun are to be skipped here."""
    absent = shutil.which("mpirun") is None or importlib.util.find_spec("mpi4py") is None
    return absent and not REQUIRED


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder under ``folder`` with its contents' hash: equal before and after, nothing changed."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def _script_main(
    script: str, arguments: list[str], cwd: str, out: str, err: str, before: Callable[[], None] | None
) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    sys.argv = [script, *arguments]
    try:
        if before is not None:
            before()
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
