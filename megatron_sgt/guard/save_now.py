"""A request to save without stopping: a file in the run's folder, which the run takes away when it has seen it.

``pretrain_sgt.py --save-now`` and ``touch`` make it. Rank 0 looks for it before every step; the others learn of it
where all agree on requests to stop (guard/stop.py), in the same number.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from megatron_sgt.errors import CheckpointError, LeaseError
from megatron_sgt.lease import holder_of, inside

FILE = "save_now"
"""In logging.run_dir; what it holds does not matter."""


class SaveTrigger:
    """The file of the run that writes into ``run_dir``."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE
        self._taken: tuple[int, int] | None = None

    def asked(self) -> bool:
        """Whether the file is there, and no request that was taken before and cannot be deleted."""
        return (found := self._found()) is not None and found != self._taken

    def take(self) -> None:
        """The request, if there is one, is being met: the file goes."""
        self._taken = self._found()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _found(self) -> tuple[int, int] | None:
        try:
            about = self._path.stat()
        except OSError:
            return None
        return about.st_ino, about.st_mtime_ns


def ask_to_save(run_dir: Path) -> str:
    """Make the file for the run that writes into ``run_dir``; returns what happens next, a sentence.

    Raises:
        LeaseError: no run does.
        CheckpointError: the file cannot be made.
    """
    holder, path = holder_of(inside(run_dir)), run_dir / FILE
    if holder is None:
        raise LeaseError(
            f"--save-now: no run writes into {run_dir}, so none can save; start it, or give its own --config"
        )
    try:
        path.touch()
    except OSError as error:
        raise CheckpointError(f"--save-now: cannot write {path}: {error.strerror}; make room and ask again") from error
    return f"asked {holder.name} to save after its next step ({path}); its SAVE line says that it has"
