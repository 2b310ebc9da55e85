"""What the tables of forged checkpoints begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.forging import write_pair


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints, to be copied before it is harmed."""
    root = tmp_path_factory.mktemp("forged") / "checkpoints"
    write_pair(root)
    return root
