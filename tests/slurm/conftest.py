"""One real Slurm for all tests of this folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import REQUIRED
from tests.helpers.slurm import SlurmCluster, missing_programs


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """A running Slurm. Without its programs the test is skipped, or fails where REQUIRE_LAUNCHERS is set."""
    missing = missing_programs()
    if missing:
        reason = f"needs Slurm (Debian: slurm-wlm, munge); no {', '.join(missing)} on this machine"
        if REQUIRED:
            pytest.fail(reason)
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the path of a socket has at most 107 characters
    running = SlurmCluster(folder)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder)
