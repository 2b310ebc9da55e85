"""What holds for every test file."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Under nohup, SIGHUP is ignored here and by every process that a test starts, and runs heed that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
LONGEST = (
    "slurm/test_jobs.py",
    "docs/test_pages.py",
    "integration/test_reshard.py",
    "golden/test_layouts.py",
    "integration/test_launchers.py",
    "integration/test_resume.py",
    "tools/test_gpu_suite.py",
    "integration/test_export.py",
    "golden/test_trajectory.py",
    "integration/test_stop.py",
    "tools/soak_parts/test_run.py",
    "planning/test_memory.py",
    "ops/test_interpreter.py",
    "golden/test_fused_trajectory.py",
    "planning/test_traffic.py",
    "guard/test_watch.py",
)
"""Files that take more than half a minute, the longest first. A file is one worker's, so those that begin late are
waited for with the other cores idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; all others stay in their order."""
    place = {TESTS / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


@pytest.fixture(autouse=True, scope="module")
def own_environment() -> Iterator[None]:
    """Variables that a file's tests set end with the file.

    A run in the process of the tests exports RANK and WORLD_SIZE; a program that a later test starts would take
    them for its own.
    """
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
