"""The pages about growth, Hugging Face and planning work from top to bottom, on the run of the quickstart."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.shell_blocks import ROOT, blocks
from tests.helpers.commands import REQUIRED, without_launcher

QUICKSTART = ROOT / "runs/quickstart"
LEFT_OUT = {
    "make study": "a quarter of an hour; tests/integration/test_study.py runs a smaller one",
    "python pretrain_sgt.py --config examples/configs/sgt_300m.yaml --dry-run": "needs that run's data",
}
"""Lines that are not run, by how they begin, and why."""


def script(page: str) -> str:
    """The bash blocks of a page without the lines that are left out."""
    lines = "\n".join(blocks(ROOT / "docs" / page)).splitlines()
    return "\n".join(line for line in lines if not line.startswith(tuple(LEFT_OUT)))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the repository's files and the quickstart's run in it."""
    if not (QUICKSTART / "hf/config.json").exists():
        (pytest.fail if REQUIRED else pytest.skip)("needs what 'make quickstart' leaves in runs/quickstart")
    for name in ("examples", "tools", "tests", "megatron_sgt", "pretrain_sgt.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(QUICKSTART, tmp_path / "runs/quickstart")
    shutil.rmtree(tmp_path / "runs/quickstart/hf")  # the page makes it
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "made"),
    [
        ("growth.md", ["compared/compare.html", "replayed/metrics.jsonl"]),
        ("huggingface.md", ["hf/config.json", "continued/metrics.jsonl"]),
        ("planning.md", []),
    ],
)
def test_every_command_works(page: str, made: list[str], place: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-x", "-c", f"set -euo pipefail\n{script(page)}"],
        cwd=place,
        env={**without_launcher(), "PATH": path, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert [name for name in made if not (place / "runs/quickstart" / name).exists()] == []


def test_what_is_left_out_is_there() -> None:
    pages = "\n".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    assert [line for line in LEFT_OUT if line not in pages] == []
