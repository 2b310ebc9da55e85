"""tools/soak.py as a user starts it. What it does is tested in tests/soak."""

from pathlib import Path

import pytest

from tests.helpers.commands import run_script


@pytest.mark.parametrize("arguments", [["--deaths", "0"], ["--layout", "pp2-zero3"]])
def test_usage(arguments: list[str], tmp_path: Path) -> None:
    done = run_script("tools/soak.py", arguments, tmp_path)
    assert (done.code, done.out) == (2, "") and "usage:" in done.err
