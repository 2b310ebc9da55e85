"""docs/tutorial.md works from top to bottom, in an empty folder beside nothing but the repository's files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.shell_blocks import ROOT, blocks
from tests.helpers.commands import ENVIRONMENT


@pytest.mark.slow
def test_every_block_runs(tmp_path: Path) -> None:
    for name in ("examples", "tools", "megatron_sgt", "pretrain_sgt.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = "set -euo pipefail\n" + "\n".join(blocks(ROOT / "docs" / "tutorial.md"))
    environment = {
        **ENVIRONMENT,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    done = subprocess.run(
        ["bash", "-x", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert (tmp_path / "runs/tutorial/run/report/report.html").exists()
    assert (tmp_path / "runs/tutorial/hf/config.json").exists()
    assert "resumed at step 30" in done.stdout
