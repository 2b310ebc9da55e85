"""Runs the operations' own tests once more on Triton's interpreter, beside the definitions.

The interpreter is chosen when Triton is imported, so it needs a process of its own. There the tests of the modules
below find a second implementation in ``tests.helpers.loop_problems.IMPLEMENTATIONS``; on a GPU they find it
without the interpreter.
"""

import os
import re
import subprocess
import sys

import pytest

from tests.architecture.source_tree import ROOT
from tests.helpers.exhaustive import exhaustive

pytest.importorskip("triton")

FILES = (
    "test_loop_projection.py",
    "test_loop_attention.py",
    "test_fused_loop.py",
    "test_entropy.py",
    "test_operators.py",
)


EVERY = "triton or opcheck"
SHARE = "opcheck or (triton and not [2- and not [3-0.0 and not [3-1.0 "
SHARE += "and (not float16 or two or square or [1-0.4))"
"""In half precision one shape of each kernel; one or three loops, three only with gates that are half open."""


@pytest.mark.parametrize(("cases", "at_least"), [(SHARE, 70), exhaustive((EVERY, 110))], ids=["a share", "all"])
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter already")
def test_kernels_on_the_interpreter(cases: str, at_least: int) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        cases,
    ]
    done = subprocess.run(
        [*command, *(f"tests/ops/{name}" for name in FILES)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed.group(1)) > at_least, done.stdout[-500:]
