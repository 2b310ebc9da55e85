"""tools/reshard_checkpoint.py as a user starts it."""

from pathlib import Path

import pytest

from megatron_sgt.checkpoint import layout
from tests.helpers.commands import run_script, snapshot
from tests.helpers.deepspeed_files import odd_config, random_state, write_checkpoint

SCRIPT = "tools/reshard_checkpoint.py"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    config = odd_config()
    write_checkpoint(tmp_path / "checkpoints", config, random_state(config), (2, 2, 3))
    return tmp_path / "checkpoints"


def test_converts_and_says_where_the_result_lies(root: Path, tmp_path: Path) -> None:
    before = snapshot(root)
    done = run_script(SCRIPT, ["--load", "checkpoints", "--output", "any"], tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("any/global_step7: 1") and " kB in " in done.out
    assert done.out.endswith("loads under any layout\n")
    assert snapshot(root) == before
    assert layout.latest_tag(tmp_path / "any") == "global_step7"


def test_mistakes_are_told_in_one_line(root: Path, tmp_path: Path) -> None:
    absent = run_script(SCRIPT, ["--load", "nowhere", "--output", "any"], tmp_path)
    assert (absent.code, absent.out) == (4, "")
    assert absent.err.startswith("error: no checkpoint at nowhere") and absent.err.count("\n") == 1
    assert run_script(SCRIPT, ["--load", "checkpoints", "--output", "any"], tmp_path).code == 0
    again = run_script(SCRIPT, ["--load", "checkpoints/global_step7", "--output", "any"], tmp_path)
    assert again.code == 4
    assert again.err == "error: any/global_step7 exists already; choose another folder, or delete it\n"
    twice = run_script(SCRIPT, ["--load", "any", "--output", "more"], tmp_path)
    assert twice.code == 4 and "is layout-free already" in twice.err
    assert run_script(SCRIPT, ["--load", "a", "--output", "b", "--processes", "0"], tmp_path).code == 2
