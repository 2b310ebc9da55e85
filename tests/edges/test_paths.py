"""``~`` and variables in every path of every command and configuration: filled in, or refused; never a folder's name.

The tables are made of the settings and arguments themselves, so that a new one cannot be left out.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_sgt.cli import job_path, output, path, path_text, sbatch_option, script_path
from megatron_sgt.config import Config, load_config, parse_config, recorded_config
from megatron_sgt.config.base import is_path, section_class
from megatron_sgt.errors import ConfigError
from megatron_sgt.launch.rank_info import RankInfo
from tests.architecture.source_tree import ROOT
from tests.helpers.commands import run_script, snapshot
from tests.helpers.edges import refused
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import TINY, tiny_config, write_tiny_data

NO_PATHS = {
    "data.split",
    "logging.wandb_project",
    "logging.wandb_name",
    "growth.stages.operator",
    "growth.stages.optimizer",
    "growth.stages.lr_policy",
    "phases.name",
}
"""Settings of any text that are no paths; one that is added must be told apart here or by its type."""
TEXT_ARGUMENTS = {"words", "number_of_bytes"}
PATH_ARGUMENTS = {"path", "path_text", "job_path", "script_path", "output", "sbatch_option"}
NUMBERS = {"int", "positive", "zero_or_more", "seed", "number", "share", "depths", "shard"}
SCRIPTS = [ROOT / "megatron_sgt/engine/main.py", *sorted((ROOT / "tools").rglob("*.py"))]


def leaves(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        inner = section_class(field.annotation)
        if inner is None:
            yield prefix + name, field
        else:
            yield from leaves(inner, f"{prefix}{name}.")


SETTINGS = [name for name, field in leaves() if is_path(field.annotation, field.metadata)]


LISTS: dict[str, dict[str, Any]] = {
    "stages": {"operator": "midas"},
    "seq_length_curriculum": {"seq_length": 8},
    "phases": {},
}
"""Settings that are lists of sections, and what an entry needs beside a value."""


BY_NAME = {"data.valid"}
"""Settings that are mappings from names to paths."""


def values_with(name: str, value: str) -> dict[str, Any]:
    """Plain values of a small run in which setting ``name`` is ``value``."""
    values: dict[str, Any] = {section: dict(content) for section, content in TINY.items()}
    *sections, last = name.split(".")
    inner = values
    for section in sections:
        if section in LISTS:
            inner = inner.setdefault(section, [dict(LISTS[section])])[0]
        else:
            inner = inner.setdefault(section, {"type": "huggingface"} if section == "tokenizer" else {})
    inner[last] = {"wiki": value} if name in BY_NAME else value
    return values


def read(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
        value = value[0] if isinstance(value, tuple) else value
    return value["wiki"] if name in BY_NAME else value


def test_every_text_is_a_path_or_known_to_be_none() -> None:
    assert {"logging.run_dir", "checkpoint.load", "data.data_path", "data.tokenizer.model"} <= set(SETTINGS)
    texts = {name for name, field in leaves() if str(field.annotation) in ("<class 'str'>", "str | None")}
    choices = {name for name, field in leaves() if any(type(item).__name__ == "Choice" for item in field.metadata)}
    assert texts - choices - set(SETTINGS) == NO_PATHS


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("GONE", raising=False)
    for text, expected in (
        ("~/a", "/home/me/a"),
        ("${SCRATCH}/a", "/scratch/me/a"),
        ("$SCRATCH/a b", "/scratch/me/a b"),
    ):
        config = parse_config(values_with(name, text))
        assert read(config, name) == expected
        assert parse_config(config.model_dump()) == config
        assert expected in config.to_yaml(), "what a checkpoint records is the path itself"
    for text, message in (("$GONE/a", "GONE is not set"), ("", "must not be empty"), ("a\nb", "holds a line break")):
        with pytest.raises(ConfigError) as caught:
            parse_config(values_with(name, text))
        assert (
            name in str(caught.value).replace("[0]", "")
            and message in str(caught.value)
            and "\n" not in str(caught.value)
        )


def test_paths_among_the_raw_settings_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = parse_config({**TINY, "deepspeed": {"csv_monitor": {"output_path": "~/csv", "job_name": "~x"}}})
    assert config.deepspeed == {"csv_monitor": {"output_path": "/home/me/csv", "job_name": "~x"}}
    with pytest.raises(ConfigError, match=r"deepspeed: nvme_path: .*GONE is not set"):
        parse_config({**TINY, "deepspeed": {"zero_optimization": {"offload_param": {"nvme_path": "$GONE"}}}})


def test_weights_stay_beside_their_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for given in ([0.5, "~/a", 0.5, "$HOME/b"], "0.5 ~/a 0.5 $HOME/b"):
        config = parse_config({**TINY, "data": {"data_path": given}})
        assert config.data.blend() == ((0.5, "/home/me/a"), (0.5, "/home/me/b"))


def test_the_base_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "below.yaml").write_text(parse_config(TINY).to_yaml())
    (tmp_path / "run.yaml").write_text("base: ~/below.yaml\n")
    assert load_config(tmp_path / "run.yaml") == parse_config(TINY)
    (tmp_path / "run.yaml").write_text("base: $GONE/below.yaml\n")
    with pytest.raises(ConfigError, match=r"base: .*GONE is not set"):
        load_config(tmp_path / "run.yaml")


def test_what_an_earlier_version_has_recorded_is_still_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(parse_config(TINY).to_yaml().replace("runs/default", "$GONE/~/run"))
    assert recorded_config(tmp_path / "config.yaml").logging.run_dir == "$GONE/~/run"


def arguments_of(script: Path) -> Iterator[tuple[str, str]]:
    """(place, name of its type) of every argument of ``script`` that takes a value."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if called not in ("add_argument", "add") or not given.keys() & {"help", "metavar", "type", "action"}:
            continue
        if "choices" in given or ast.unparse(given.get("action", ast.Constant(""))) == "'store_true'":
            continue
        kind = ast.unparse(given["type"]) if "type" in given else "nothing"
        yield f"{script.relative_to(ROOT)}:{node.lineno} {ast.unparse(node.args[0])}", kind


def test_every_argument_says_what_it_takes() -> None:
    found = [argument for script in SCRIPTS for argument in arguments_of(script)]
    wrong = [f"{place} is {kind}" for place, kind in found if kind not in TEXT_ARGUMENTS | PATH_ARGUMENTS | NUMBERS]
    assert not wrong, "\n".join(wrong)
    assert sum(kind in PATH_ARGUMENTS for _, kind in found) > 30


@pytest.mark.parametrize("kind", [path, path_text, output, job_path, script_path])
def test_a_kind_of_argument(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/tmp/me")
    assert str(kind("~/a b")) == "/tmp/me/a b"
    for text in ("$GONE/a", "", "~nobody-here/a", "a\nb"):
        with pytest.raises(Exception, match=r"GONE is not set|must not be empty|no user|line break"):
            kind(text)


def test_options_of_sbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert sbatch_option("--chdir=~/a") == "--chdir=/home/me/a"
    assert sbatch_option("--error=%j.log") == "--error=%j.log"
    assert sbatch_option("--exclusive") == "--exclusive"
    with pytest.raises(Exception, match="SLURM_JOB_ID is the job's own"):
        sbatch_option("--output=$SLURM_JOB_ID.log")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def set_places() -> None:
    os.environ.update(HOME=os.path.abspath("home"), SCRATCH=os.path.abspath("scratch"))


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("tools/report.py", ["$GONE/a"]),
        ("tools/plan.py", ["--config", "~nobody-here/a.yaml"]),
        ("tools/preprocess_data.py", ["--input=a", "--output-prefix=$GONE/b", "--tokenizer-model=~/c"]),
        ("tools/inspect_checkpoint.py", [""]),
        ("tools/submit_slurm.py", ["--config=run.yaml", "--nodes=1", "logging.run_dir=$SLURM_JOB_ID"]),
        ("pretrain_sgt.py", ["--config", "run.yaml", "logging.run_dir=$GONE/a"]),
        ("pretrain_sgt.py", ["--config", "run.yaml", "data.data_path=0.5 $GONE/a 0.5 b"]),
    ],
)  # fmt: skip
def test_a_command_refuses(script: str, arguments: list[str], data: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(tiny_config(Path("runs/a"), data).to_yaml())
    before = snapshot(tmp_path)
    refused(run_script(script, arguments, tmp_path), 2, r"GONE is not set|nobody-here|must not be empty|the job's own")
    assert snapshot(tmp_path) == before


def test_a_job_is_submitted_with_the_paths_of_here(data: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(tiny_config(Path("runs/a"), data).to_yaml())
    arguments = [
        "--config=run.yaml",
        "--nodes=1",
        "--dry-run",
        "logging.run_dir=$SCRATCH/100% x",
        "--container=~/i.sif",
    ]
    done = run_script("tools/submit_slurm.py", [*arguments, "--mount=$TMPDIR/x"], tmp_path, before=set_places)
    assert done.code == 0, done.err
    folder = f"{tmp_path}/scratch/100% x/slurm"
    assert f"job='{folder}'" in done.out
    assert f"#SBATCH '--output={folder.replace('%', '%%')}/%j.log'" in done.out, "Slurm fills in what follows a %"
    assert '--output="${logs//%/%%}/rank-%4t.log"' in done.out
    assert f"{tmp_path}/home/i.sif" in done.out and '--bind "$TMPDIR/x"' in done.out


def folders_told(info: RankInfo, folder: str) -> str:
    """What a rank says of a run folder that differs between the ranks; for ``run_on_ranks``."""
    os.environ["PLACE"] = f"{folder}/{info.rank // 2}"
    from megatron_sgt.engine.build import start_processes

    try:
        start_processes(tiny_config(Path("$PLACE/run"), "none"), info)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_mean_different_folders(tmp_path: Path) -> None:
    assert run_on_ranks(2, folders_told, str(tmp_path)) == ["", ""]
    told = run_on_ranks(3, folders_told, str(tmp_path))
    message = f"logging.run_dir is {tmp_path}/0/run for rank 0, but {tmp_path}/1/run for rank 2: write a path"
    assert told[0].startswith(message) and told[2].startswith(message) and "for rank 2" in told[1]
