"""tools/submit_slurm.py as a user starts it, and the examples that it has written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, run_process, snapshot
from tests.helpers.runs import tiny_config, write_tiny_data

TOOL = str(ROOT / "tools/submit_slurm.py")
EXAMPLES = sorted(path for path in (ROOT / "examples/slurm").glob("*.sbatch") if path.stem != "preprocess")

# Lets Python import the standard library, the project, pydantic and PyYAML, and nothing else.
BARE = f"""
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy", "deepspeed", "megatron", "transformers", "sentencepiece", "tqdm"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import importlib.util
found = importlib.util.find_spec
def find_spec(name, package=None):
    try:
        return found(name, package)
    except ModuleNotFoundError:
        return None
importlib.util.find_spec = find_spec
sys.argv[0] = {TOOL!r}
runpy.run_path({TOOL!r}, run_name="__main__")
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    data = write_tiny_data(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(tiny_config(Path("runs/a"), data).to_yaml())
    return str(path)


def test_a_dry_run_prints_the_script_and_writes_nothing(config: str, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    done = run_process([sys.executable, TOOL, "--config", config, "--nodes", "2", "--dry-run"], tmp_path)
    assert done.code == 0, done.err
    assert [line.split()[0] for line in done.err.splitlines()] == ["layout", "batch", "data", "disk", "start"]
    assert done.out.startswith("#!/bin/bash\n# sgt:runs/a on 2 nodes.")
    assert f"{sys.executable} -m megatron_sgt" in done.out
    assert snapshot(tmp_path) == before


def test_a_login_node_needs_pydantic_and_yaml_alone(config: str, tmp_path: Path) -> None:
    done = run_process([sys.executable, "-c", BARE, "--config", config, "--nodes", "2", "--dry-run"], tmp_path)
    assert done.code == 0, done.err
    assert "not read: no numpy here" in done.err and done.out.startswith("#!/bin/bash\n")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["model.num_layer=3"], 2, "did you mean 'num_layers'?"),
        (["parallel.tensor_model_parallel_size=4", "--nodes", "3"], 2, "; ask for --nodes 4 or a multiple of it, or "),
        (["train.global_batch_size=6"], 2, "batch sizes do not multiply"),
        (["data.data_path=[/nowhere/x]"], 3, "/nowhere/x"),
        (["checkpoint.load=/nowhere"], 4, "no checkpoint at /nowhere"),
        (["--env", "A"], 2, "--env must be NAME=VALUE"),
        (["--nodes", "0"], 2, "above 0"),
    ],
)
def test_nothing_is_submitted_with_a_mistake(
    config: str, tmp_path: Path, arguments: list[str], code: int, told: str
) -> None:
    before = snapshot(tmp_path)
    done = run_process([sys.executable, TOOL, "--config", config, "--nodes", "2", *arguments], tmp_path)
    assert (done.code, done.out) == (code, "") and told in done.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_what_the_tool_writes(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their second line holds the command."""
    from megatron_sgt.config import load_config
    from megatron_sgt.launch.sbatch import sbatch_script
    from tools.submit_slurm import describe, parse

    monkeypatch.chdir(ROOT)
    lines = example.read_text().splitlines(keepends=True)
    match = re.fullmatch(r"# python tools/submit_slurm.py (.*)\n", lines.pop(1))
    assert match is not None
    monkeypatch.setattr(sys, "argv", ["submit_slurm.py", *match[1].split()])
    args = parse()
    assert "".join(lines) == sbatch_script(describe(args, load_config(args.config, args.overrides)))
    subprocess.run(["bash", "-n", str(example)], check=True)


def test_memory_nodes_and_the_order_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sgt.launch.sbatch import sbatch_script
    from tests.helpers.single import small_config
    from tools.submit_slurm import describe, parse

    def asked(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["submit_slurm.py", "--config", "x.yaml", "--nodes", "2", *arguments])
        lines = sbatch_script(describe(parse(), small_config())).splitlines()
        return [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH --")]

    plain = asked()
    assert "distribution=block:block" in plain and "exclusive" not in plain
    assert not any(line.startswith("mem") for line in plain)
    assert {"mem=0", "exclusive"} < set(asked("--mem", "0", "--exclusive"))
    changed = asked("--sbatch=--distribution=cyclic")
    assert changed.index("distribution=cyclic") > changed.index("distribution=block:block"), "the last one counts"


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 5
