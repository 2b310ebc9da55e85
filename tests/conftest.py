"""What holds for every test file."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


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
