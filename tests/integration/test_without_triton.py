"""A machine without Triton, as `pip install megatron-sgt` alone leaves it: the same run, number by number."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import ROOT, Finished, run_process
from tests.helpers.runs import measured_steps, tiny_config, write_tiny_data

# None in sys.modules makes an import fail and a search find nothing.
WITHOUT = "import runpy, sys; sys.modules['triton'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
WITH = "import runpy, sys; import triton; runpy.run_path(sys.argv.pop(1), run_name='__main__')"


def train(code: str, folder: Path, data: str, **sections: dict[str, Any]) -> Finished:
    folder.mkdir()
    (folder / "run.yaml").write_text(tiny_config(folder / "run", data, **sections).to_yaml())
    script = str(ROOT / "pretrain_sgt.py")
    return run_process([sys.executable, "-c", code, script, "--config", "run.yaml"], folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
def test_the_run_is_the_same(tmp_path: Path, data: str) -> None:
    steps = {}
    for name, code in (("with", WITH), ("without", WITHOUT)):
        done = train(code, tmp_path / name, data)
        assert done.code == 0, done.err
        steps[name] = measured_steps(tmp_path / name / "run")
    assert steps["with"] == steps["without"]
    assert steps["without"][-1]["phase"] == "fixed" and sum(steps["without"][-1]["loop_depth"]) > 0


def test_kernels_asked_for_by_name_are_refused(tmp_path: Path, data: str) -> None:
    done = train(WITHOUT, tmp_path / "run", data, train={"loop_backend": "triton"})
    assert done.code == 2
    assert "Triton is not installed (pip install megatron-sgt[gpu])" in done.err
