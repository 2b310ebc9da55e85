"""The folders that a run writes into: held by rank 0 from before the first file to the end."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from megatron_sgt.config import Config
from megatron_sgt.errors import LeaseError
from megatron_sgt.files import replace_text
from megatron_sgt.lease import Hold, Lease, inside
from megatron_sgt.parallel.collectives import on_rank_zero

CONFIG_FILE = "config.yaml"


class RunFolders:
    """logging.run_dir and checkpoint.save, each with a lease of its own: another run may share only one of them."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._hold = Hold()
        self._written = False
        self._lock = threading.Lock()
        self._remade: list[float | None] = []

    def take(self) -> None:
        """Hold the folders; collective. Ranks other than 0 hold nothing and are never refused.

        Raises:
            LeaseError: on every rank, when another run that is alive writes into one of them, or none can be written.
        """
        timeout = self._config.checkpoint.writer_timeout_seconds
        leases = [
            Lease(inside(folder), "a run", f"choose another {setting}", folder, timeout)
            for setting, folder in (
                ("logging.run_dir", Path(self._config.logging.run_dir)),
                ("checkpoint.save", self._config.save_dir),
            )
        ]
        on_rank_zero(lambda: self._take(leases))

    def _take(self, leases: list[Lease]) -> None:
        try:
            self._hold.take(*leases)
        except OSError as error:
            raise LeaseError(f"the lease that keeps other runs out cannot be written: {error}") from error

    def write_config(self) -> None:
        """Write the resolved configuration into run_dir; for rank 0, once it holds it."""
        run_dir = Path(self._config.logging.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_text(run_dir / CONFIG_FILE, self._config.to_yaml())
        self._written = True

    def check(self) -> None:
        """Return if this run may still write; to be called before each file that counts. What was deleted is remade.

        Raises:
            LeaseError: another run has taken a folder over.
        """
        with self._lock:  # a thread commits asynchronous saves
            self._hold.check()
            remade = [lease.remade for lease in self._hold.leases]
            if self._written and remade != self._remade and any(remade):
                with suppress(OSError):  # the writers of this folder complain; tried again with the next
                    self.write_config()
                    self._remade = remade

    def release(self) -> None:
        """Give the folders back, and say once more which of them had gone."""
        for lease in self._hold.remade:
            when = time.strftime("%H:%M:%S", time.localtime(lease.remade))
            print(
                f"warning: {lease.subject} was deleted or moved away during the run and made again at {when}: what it "
                "held before is not there",
                file=sys.stderr,
            )
        self._hold.release()
