"""The hook of docs/extending.md, taken from the page: named by a configuration, restarted, and given in Python."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from megatron_sgt import extensions
from megatron_sgt.config import Config
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.launch.rank_info import RankInfo
from tests.docs.shell_blocks import ROOT
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import measured_steps, pretrain, reported, tiny_config, write_tiny_data

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
STEPS = 6


def block(language: str) -> str:
    """The only block of the page in ``language``."""
    [text] = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return text


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the page's hook as an installed package: module, and the page's own entry point."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "loss_average.py").write_text(block("python"))
    info = folder / "loss_average-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loss-average\nVersion: 1.0\n")
    group, line = re.findall(r'^\[project\.entry-points\."(.*)"\]\n(loss_average.*)$', block("toml"), re.MULTILINE)[0]
    (info / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n")
    return folder


def train(info: RankInfo, config: Config, site: Path) -> None:
    """For ``run_on_ranks``."""
    sys.path.insert(0, str(site))
    pretrain(info, config)


def train_in_python(info: RankInfo, config: Config, site: Path) -> None:
    """For ``run_on_ranks``: as the page says."""
    sys.path.insert(0, str(site))
    hook = importlib.import_module("loss_average").LossAverage(decay=0.5)
    PretrainingRun(config, info, hooks=[hook]).train()


def averages(run_dir: Path) -> list[float]:
    """What the hook has reported, by step."""
    records = reported(run_dir, "hook")
    assert [(record["step"], record["hook"]) for record in records] == [
        (step, "loss_average") for step in range(1, STEPS + 1)
    ]
    return [record["values"]["loss"] for record in records]


def expected(run_dir: Path, decay: float) -> list[float]:
    """The moving average of the losses that the run reported."""
    values: list[float] = []
    for loss in (step["loss"] for step in measured_steps(run_dir)):
        values.append(decay * values[-1] + (1 - decay) * loss if values else loss)
    return values


def test_the_hook_of_the_page_goes_on_after_a_restart(site: Path, tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path)

    def config(name: str, **more: int) -> Config:
        settings = {"train_iters": STEPS, "eval_interval": 0, "hooks": ["loss_average"], **more}
        return tiny_config(tmp_path / name, data, train=settings)

    run_on_ranks(2, train, config("whole"), site)
    assert averages(tmp_path / "whole") == pytest.approx(expected(tmp_path / "whole", 0.9), abs=1e-12)
    for end in (3, STEPS):
        run_on_ranks(2, train, config("parts", exit_interval=end), site)
    assert averages(tmp_path / "parts") == averages(tmp_path / "whole"), "bit for bit"
    saved = json.loads((tmp_path / f"parts/checkpoints/global_step{STEPS}/sgt_state.json").read_text())
    assert saved["hooks"]["loss_average"] == {"value": averages(tmp_path / "parts")[-1]}
    assert list(saved["hooks"]) == ["growth", "spike", "loss_average"]


def test_the_hook_of_the_page_in_python(site: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", write_tiny_data(tmp_path), train={"train_iters": STEPS, "eval_interval": 0})
    run_on_ranks(1, train_in_python, config, site)
    assert averages(tmp_path / "run") == pytest.approx(expected(tmp_path / "run", 0.5), abs=1e-12)


def test_the_groups_and_files_of_the_page_are_those_of_the_registry() -> None:
    rows = re.findall(r"^\| .* \| `megatron_sgt\.(\w+)` \| .*`(megatron_sgt/[\w/]+\.py)`", PAGE, re.MULTILINE)
    assert dict(rows) == extensions.GROUPS
