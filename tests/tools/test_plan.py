"""The planner as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.commands import ENVIRONMENT, ROOT, Finished, run_process
from tests.helpers.datasets import write_dataset

CONFIG = "examples/configs/sgt_70b.yaml"


def plan(*arguments: str) -> Finished:
    return run_process([sys.executable, "tools/plan.py", *arguments], ROOT)


def test_a_plan_as_text_and_as_json() -> None:
    text, numbers = (
        plan("--config", CONFIG, "--nodes", "32"),
        plan("--config", CONFIG, "--nodes", "32", "--json"),
    )
    assert (text.code, text.err, numbers.code) == (0, "", 0)
    assert text.out.startswith(f"plan of {CONFIG} on 32 nodes of 8 x NVIDIA H100 80GB HBM3")
    assert "a vocabulary of 32,000 tokens is assumed" in " ".join(text.out.split())
    assert json.loads(numbers.out)["layout"]["data_parallel"] == 32


def test_it_takes_less_than_two_seconds_and_no_torch() -> None:
    """Wall time on an idle machine; processor time here, which other work does not stretch."""
    program = (
        "import runpy, sys, time\n"
        f"sys.argv = ['plan.py', '--config', {CONFIG!r}, '--nodes', '512']\n"
        "try:\n    runpy.run_path('tools/plan.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'megatron', 'deepspeed', 'transformers', 'triton'}\n"
        "print(sorted(heavy.intersection(name.partition('.')[0] for name in sys.modules)), time.process_time())"
    ).replace("\\\n", "\n")
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    wall = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    loaded, _, seconds = done.stdout.splitlines()[-1].rpartition(" ")
    assert loaded == "[]"
    assert float(seconds) <= 2.0, f"{seconds} s of processor time, {wall:.1f} s of wall time"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "no such file: none.yaml"),
        (["--config", CONFIG, "--gpu", "tpu"], "GPU 'tpu' is not in the table"),
        (["--config", CONFIG, "--mfu", "0"], "must be above 0"),
        (["--config", CONFIG, "train.global_batch_size=1000", "--nodes", "32"], "nearest that work: 992"),
        (["--config", CONFIG, "--gpus-per-node", "4", "--nodes", "1"], "does not divide the 4 processes"),
        (["--config", CONFIG, "model.num_query_groups=4"], "num_query_groups: 4 is not a multiple of"),
    ],
)
def test_mistakes_are_told_in_one_line_with_the_numbers(arguments: list[str], message: str) -> None:
    done = plan(*arguments)
    assert done.code == 2
    assert message in done.err and "Traceback" not in done.err


def test_mfu_reads_as_people_write_it() -> None:
    days = [
        json.loads(plan("--config", CONFIG, "--nodes", "32", "--json", "--mfu", text).out)["run"]["days"]
        for text in ("0.5", "50", "50%")
    ]
    assert days[0] == days[1] == days[2]


def test_the_fastest_layouts_as_text_and_as_json() -> None:
    arguments = ("--config", "examples/configs/sgt_1.2b.yaml", "--nodes", "2", "--search", "train.global_batch_size=32")
    text, numbers = plan(*arguments), plan(*arguments, "--json")
    assert (text.code, numbers.code) == (0, 0)
    assert text.out.startswith("layouts of examples/configs/sgt_1.2b.yaml on 2 nodes of 8 x NVIDIA H100")
    rows = json.loads(numbers.out)["layouts"]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert "a vocabulary of 32,000 tokens is assumed" in text.err
    assert "cuts the layers of a pipeline depends on the vocabulary" in text.err


def test_documents_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Documents of a quarter of a sequence."""
    from tools.plan import main

    prefix = write_dataset(tmp_path / "x", [1024] * 41)
    more = [f"data.data_path={prefix}", "data.split=1,0,0", "model.seq_length=4096", "--data"]
    for mask, said in (
        ("true", "documents attention has 25 % of the work of whole sequences (measured)"),
        ("false", "--data: nothing to measure"),
    ):
        arguments = [
            "--config",
            str(ROOT / "examples/configs/sgt_300m.yaml"),
            *more,
            f"data.reset_attention_mask={mask}",
        ]
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        main()
        assert said in " ".join(capsys.readouterr().out.split())
