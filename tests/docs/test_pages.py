"""The pages about growth, Hugging Face, layouts and planning work from top to bottom, on the run of the quickstart; the
tutorial does in an empty folder, beside nothing but the repository's files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.docs.page import in_forks, in_one_shell
from tests.docs.shell_blocks import ROOT, blocks
from tests.helpers.commands import REQUIRED

QUICKSTART = ROOT / "runs/quickstart"
LEFT_OUT = {
    "make study": "takes ten minutes; tests/integration/test_study.py (make test-all) runs a smaller one",
    "python pretrain_sgt.py --config examples/configs/sgt_300m.yaml --dry-run": "needs that run's data",
}
"""Lines that are not run, by how they begin, and why."""
SLOW = {
    "python tools/plan.py --config examples/configs/sgt_70b.yaml --nodes 64 --search": "as that of the smaller model",
    "lm_eval --model hf": "imports for ten seconds what tests/evaluation/test_downstream.py runs in its process",
}
"""Lines that `make test-all` alone runs."""
WAYS = pytest.mark.parametrize("way", [in_forks, pytest.param(in_one_shell, marks=pytest.mark.exhaustive)])


def script(page: str, left_out: Iterable[str]) -> str:
    """The bash blocks of a page without the lines that begin as one of ``left_out``."""
    lines = "\n".join(blocks(ROOT / "docs" / page)).replace("\\\n", "\\\0").splitlines()
    return "\n".join(line for line in lines if not line.startswith(tuple(left_out))).replace("\0", "\n")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the repository's files."""
    for name in ("examples", "tools", "tests", "megatron_sgt", "pretrain_sgt.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "made"),
    [
        ("growth.md", ["compared/compare.html", "replayed/metrics.jsonl"]),
        ("huggingface.md", ["hf/config.json", "continued/metrics.jsonl"]),
        ("layouts.md", ["pipeline/metrics.jsonl", "pipeline_hf/config.json"]),
        ("planning.md", []),
    ],
)
@WAYS
def test_every_command_works(page: str, made: list[str], way: Callable[[str, Path], str], place: Path) -> None:
    if not (QUICKSTART / "hf/config.json").exists():
        (pytest.fail if REQUIRED else pytest.skip)("needs what 'make quickstart' leaves in runs/quickstart")
    shutil.copytree(QUICKSTART, place / "runs/quickstart")
    shutil.rmtree(place / "runs/quickstart/hf")  # the page makes it
    way(script(page, [*LEFT_OUT, *(() if way is in_one_shell else SLOW)]), place)
    assert [name for name in made if not (place / "runs/quickstart" / name).exists()] == []


@pytest.mark.slow
@WAYS
def test_the_tutorial_works(way: Callable[[str, Path], str], place: Path) -> None:
    said = way(script("tutorial.md", LEFT_OUT), place)
    assert (place / "runs/tutorial/run/report/report.html").exists()
    assert (place / "runs/tutorial/hf/config.json").exists()
    assert "resumed at step 30" in said


def test_what_is_left_out_is_there() -> None:
    pages = "\n".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    assert [line for line in (*LEFT_OUT, *SLOW) if line not in pages] == []
