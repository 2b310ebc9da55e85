"""No command dies for a sign that its terminal lacks, nor for a locale; what it writes into files is UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sgt.config import recorded_config
from megatron_sgt.jsonl import read_metrics
from tests.helpers import grown_run
from tests.helpers.commands import ENVIRONMENT, ROOT, Finished, run_script, without_launcher
from tests.helpers.edges import in_every_encoding, refused, use_encoding
from tests.helpers.runs import tiny_config, write_tiny_data

FOLDER = "läufe · 北京"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and a configuration whose run folder is written in signs of many scripts."""
    folder = tmp_path_factory.mktemp("encodings")
    config = tiny_config(Path(FOLDER), write_tiny_data(folder), train={"train_iters": 3, "eval_interval": 0})
    (folder / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (folder / "text.jsonl").write_text('{"text": "naïve 北京"}\n' * 9, encoding="utf-8")
    return folder


def is_printed(finished: Finished) -> None:
    assert "Traceback" not in finished.out + finished.err
    assert "UnicodeEncodeError" not in finished.err


COMMANDS = {
    "dry run": ("pretrain_sgt.py", ["--config", "run.yaml", "--dry-run"]),
    "configuration": ("pretrain_sgt.py", ["--config", "run.yaml", "--print-config"]),
    "plan": ("tools/plan.py", ["--config", "run.yaml", "--gpus-per-node", "1"]),
    "job": ("tools/submit_slurm.py", ["--config", "run.yaml", "--nodes", "1", "--dry-run"]),
    "help": ("tools/evaluate.py", ["--help"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(name: str, home: Path) -> None:
    script, arguments = COMMANDS[name]
    in_every_encoding(script, arguments, home, 0, check=is_printed)


@pytest.mark.parametrize("tool", ["summarize_run.py", "report.py", "inspect_checkpoint.py"])
def test_a_tool_on_a_run(tool: str, tmp_path: Path) -> None:
    run = grown_run.checkpoints().parent
    (tmp_path / "läufe ·").symlink_to(run)
    arguments = ["läufe ·/checkpoints" if tool.startswith("inspect") else "läufe ·"]
    arguments += ["--output", "seite ·"] if tool == "report.py" else []
    in_every_encoding(f"tools/{tool}", arguments, tmp_path, 0, check=is_printed)


def test_a_refusal(home: Path) -> None:
    arguments = ["--config", "run.yaml", "data.data_path=nirgends · 北京"]
    in_every_encoding("pretrain_sgt.py", arguments, home, 3, "no indexed data set at nirgends")


def in_ascii() -> None:
    use_encoding("ascii")


def test_a_run(home: Path) -> None:
    done = run_script("pretrain_sgt.py", ["--config", "run.yaml"], home, before=in_ascii)
    assert done.code == 0 and done.err == "", done.err
    assert "DONE" in done.out and done.out.isascii()
    assert recorded_config(home / FOLDER / "config.yaml").logging.run_dir == FOLDER
    assert read_metrics(home / FOLDER / "metrics.jsonl")[-1]["kind"] == "summary"


LOCALES = {
    "C": {"LC_ALL": "C"},
    "C, nothing coerced": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "iso8859-2", "PYTHONUTF8": "0"},
}


@pytest.mark.parametrize("name", LOCALES)
def test_a_locale(name: str, home: Path, tmp_path: Path) -> None:
    """A process of its own: the encoding of file names is chosen when Python starts."""
    plain = {key: value for key, value in without_launcher().items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    environment = {**plain, "PYTHONPATH": ENVIRONMENT["PYTHONPATH"], **LOCALES[name]}
    command = [sys.executable, str(ROOT / "tools/plan.py"), "--config", "run.yaml", "--gpus-per-node", "1", "--json"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, check=False)
    if name == "C, nothing coerced":  # this Python cannot name the folder, and says how it could
        assert done.returncode == 2 and b"Traceback" not in done.stderr
        assert b"logging.run_dir: " in done.stderr and b"export LC_ALL=C.UTF-8" in done.stderr
        command.append("logging.run_dir=plain")
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"] == "run.yaml"


def test_names_that_are_no_text(home: Path, tmp_path: Path) -> None:
    """Bytes that are no UTF-8 in the name of a file or folder."""
    strange = os.fsdecode(b"r\xff")
    done = run_script("pretrain_sgt.py", ["--config", "run.yaml", "--print-config", f"logging.run_dir={strange}"], home)
    assert done.code == 0 and '"r\\uDCFF"' in done.out, done.err
    refused(run_script("tools/summarize_run.py", [strange], tmp_path), 3, r"r\\udcff/metrics.jsonl")


def test_json_lines_stay_json(home: Path) -> None:
    """Signs of a text inside JSON become escapes of JSON, whatever the terminal takes."""
    script = "import json, sys; from megatron_sgt.streams import is_utf8; "
    script += "print(json.dumps({'text': '“ä”'}, ensure_ascii=not is_utf8(sys.stdout)))"
    for encoding in ("ascii", "utf-8"):
        environment = {**ENVIRONMENT, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
        assert json.loads(done.stdout) == {"text": "“ä”"}
