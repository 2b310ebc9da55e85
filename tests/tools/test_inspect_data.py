"""tools/inspect_data.py as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ENVIRONMENT, ROOT, run_script, snapshot
from tests.helpers.datasets import write_dataset
from tests.helpers.runs import tiny_config

SCRIPT = "tools/inspect_data.py"


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "a_text_document", [5, 30, 0, 12, 9, 40, 3] * 4, vocab_size=64)


def test_shows_a_data_set_and_a_run(prefix: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(tiny_config(tmp_path / "run", prefix).to_yaml())
    before = snapshot(tmp_path)
    done = run_script(SCRIPT, ["a", "model.seq_length=16", "--samples=2"], tmp_path)
    assert (done.code, done.err) == (0, "")
    assert "28, 4 of them empty" in done.out and "sample 1: 16 tokens" in done.out and "attends from" in done.out
    as_json = run_script(
        SCRIPT,
        [
            "--config=run.yaml",
            "data.packing=best_fit",
            "data.reset_attention_mask=true",
            "data.data_cache_path=null",
            "--first=3",
            "--json",
        ],
        tmp_path,
    )
    values = json.loads(as_json.out)
    assert as_json.code == 0, as_json.err
    assert values["settings"]["packing"] == "best_fit" and values["samples"][0]["index"] == 3
    assert values["files"][0]["splits"][0]["padding"] > 0
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "give the PREFIX of a .bin/.idx pair, or a run's --config"),
        (["a", "b"], 2, "give one PREFIX, not a and b"),
        (["a", "--split=all"], 2, "invalid choice: 'all'"),
        (["a", "--samples=-1"], 2, "0 or an integer above it"),
        (["a", "data.packing=bestfit"], 2, "data.packing"),
        (["a", "model.seq_length=4096"], 3, "less than one sample of 4096 + 1"),
        (["a", "--tokenizer=none.model"], 3, "none.model does not exist"),
        (["nope"], 3, "no indexed data set at nope"),
    ],
)
def test_mistakes(arguments: list[str], code: int, said: str, prefix: str, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    done = run_script(SCRIPT, arguments, tmp_path)
    assert done.code == code and said in done.err and done.out == ""
    assert snapshot(tmp_path) == before


def test_a_usage_error_needs_no_torch() -> None:
    program = (
        "import runpy, sys\n"
        "sys.argv = ['inspect_data.py']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as leave:\n"
        "    heavy = {'torch', 'numpy', 'pydantic', 'megatron'}\n"
        "    print(leave.code, sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n"
