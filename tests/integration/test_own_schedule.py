"""The schedule of docs/growth.md, installed as a package: trained, resumed, planned, reported, exported, evaluated."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint.contents import read_contents
from megatron_sgt.checkpoint.describe import describe
from megatron_sgt.checkpoint.layout import resolve
from megatron_sgt.checkpoint.manifest import size_problems
from megatron_sgt.config import Config
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.own_model import own_model
from megatron_sgt.export.source import open_checkpoint
from megatron_sgt.export.to_hf import export_checkpoint
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.apply_plan import executed_plan
from megatron_sgt.planning.hardware import find_gpu
from megatron_sgt.planning.plan import make_plan
from megatron_sgt.planning.render import render
from megatron_sgt.planning.step_time import Machine
from megatron_sgt.preflight import find_start
from megatron_sgt.reporting.report import write_report
from tests.architecture.source_tree import ROOT
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import measured_steps, pretrain, reported, tiny_config, write_tiny_data

OPTIONS = {"step": 3, "layers": 2}
TENSOR_PARALLEL = {"tensor_model_parallel_size": 2}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The example's own text, on the path with the entry point that the page names."""
    folder = tmp_path_factory.mktemp("site")
    page = (ROOT / "docs/growth.md").read_text()
    (example,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class AtOnce(" in b)
    (entry,) = re.findall(r"```toml\n\[project\.entry-points\.\"([\w.]+)\"\]\n(.*?)```", page, re.DOTALL)
    (folder / "at_once.py").write_text(example)
    info = folder / "at_once-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: at_once\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{entry[0]}]\n{entry[1].replace(chr(34), '')}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    sys.modules.pop("at_once", None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def config_of(run_dir: Path, data: str, **train: Any) -> Config:
    return tiny_config(
        run_dir,
        data,
        growth={"method": "at_once", "options": OPTIONS},
        parallel=TENSOR_PARALLEL,
        train={"train_iters": 6, **train},
    )


@pytest.fixture(scope="module")
def run_dir(package: None, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of two tensor-parallel ranks leaves behind."""
    folder = tmp_path_factory.mktemp("run")
    run_on_ranks(2, pretrain, config_of(folder, data))
    return folder


def test_it_decides_once_and_resumes_exactly(run_dir: Path, data: str, tmp_path: Path) -> None:
    (event,) = reported(run_dir, "growth")
    assert (event["step"], event["action"], sum(event["loop_depth"])) == (3, "chosen", 2)
    assert event["flops_overhead"] > 0
    for exit_interval in (2, 5, None):  # before the decision, and after it
        run_on_ranks(2, pretrain, config_of(tmp_path, data, exit_interval=exit_interval))
    assert measured_steps(tmp_path) == measured_steps(run_dir)
    assert [step["phase"] for step in measured_steps(run_dir)] == ["vanilla"] * 2 + ["growing"] * 4


def test_its_checkpoint_is_refused_by_the_standard_rule(run_dir: Path, data: str, tmp_path: Path) -> None:
    there = {"load": str(run_dir / "checkpoints")}
    standard = tiny_config(tmp_path, data, parallel=TENSOR_PARALLEL, checkpoint=there)
    with pytest.raises(CheckpointError, match=r"growth rule \(checkpoint 'at_once', run 'sgt'\)"):
        find_start(standard)
    own = config_of(tmp_path, data)
    assert find_start(own.model_copy(update={"checkpoint": standard.checkpoint})).folder is not None


def test_it_is_planned_and_reported(run_dir: Path, data: str) -> None:
    config = config_of(run_dir, data)
    plan = make_plan(config, 2, Machine(find_gpu("h100")), 0.4, "fp32")
    assert [(entry["phase"], entry["last_step"], entry["loops"]) for entry in plan["compute"]] == [
        ("vanilla", 3, 0),
        ("chosen", 6, 2),
    ]
    assert plan["memory"]["now"]["loops"] == 0 < plan["memory"]["final"]["loops"]
    assert {"loops", "entropy"} <= {item["part"] for item in plan["traffic"]["per_step"]}
    assert "at_once, version 1: at most +" in render(plan, config, "a plan")
    page, *_ = write_report(run_dir)
    assert "chosen" in page.read_text()


def test_its_structure_is_exported_and_evaluated(run_dir: Path, tmp_path: Path) -> None:
    (event,) = reported(run_dir, "growth")
    root = run_dir / "checkpoints"
    export_checkpoint(root, tmp_path / "hf")
    loops = json.loads((tmp_path / "hf/config.json").read_text())["sgt_loops"]
    assert {n: loop["heads"] for n, loop in loops.items()} == event["kept_heads"]
    source = open_checkpoint(root)
    model = own_model(source, source.plan(), torch.float32)
    assert executed_plan(model) == source.plan()
    text = describe(read_contents(resolve(root), size_problems))
    assert "growth    at_once, phase growing, 2 layers selected" in text


def look(info: RankInfo, config: Config) -> tuple[str, str, int]:
    from at_once import AtOnce  # type: ignore[import-not-found]

    run = PretrainingRun(config, info, schedule=AtOnce)
    return type(run.schedule).__name__, run.config.growth.method, run.runtime.model.meter._sum.shape[1]


def test_python_passes_it_as_an_argument(package: None, data: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data, growth={"method": "vanilla"})
    assert run_on_ranks(1, look, config) == [("AtOnce", "at_once", 2)]
