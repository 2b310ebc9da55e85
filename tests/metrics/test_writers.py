"""TensorBoard files read back with TensorBoard's own reader; W&B through a stand-in for its package."""

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron_sgt.config.run import LoggingConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.metrics.writers import TensorBoardWriter, WandbWriter, check_packages, scalars

TRAIN = {"step": 3, "time": 5.0, "train_iters": 9, "loss": 2.5, "loops": 2, "mfu": None, "device": "cpu"}


def test_scalars_are_the_numbers_that_make_curves() -> None:
    record = {**TRAIN, "grad_norm": np.float32(0.5), "flag": True, "kept_heads": {"3": [1]}}
    assert scalars("train", record) == {"train/loss": 2.5, "train/loops": 2.0, "train/grad_norm": 0.5}


def test_scalars_of_a_hook_are_its_values() -> None:
    record = {"step": 3, "time": 5.0, "hook": "loss_average", "values": {"loss": 2.5}}
    assert scalars("hook", record) == {"hook/loss_average/loss": 2.5}


def test_scalars_of_a_save_have_the_epochs_of_the_sources() -> None:
    record = {"step": 3, "bytes": 5, "source_tokens": {"a": 7}, "source_epochs": {"a": 0.5, "b": None}}
    assert scalars("save", record) == {"save/bytes": 5.0, "save/source_epochs/a": 0.5}


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = TensorBoardWriter(tmp_path)
    writer.write("train", TRAIN)
    writer.write("tasks", {"step": 3, "results": {"words": {"acc": 0.5}}, "seconds": 1.0})
    writer.write("valid", {"step": 3, "loss": 2.75, "sets": {"wiki": {"loss": 2.5, "samples": 4}}})
    writer.write("train", {**TRAIN, "step": 4, "loss": 9.0})
    writer.write("resume", {"step": 3, "path": "p"})
    writer.advance(4)
    writer.write("train", {**TRAIN, "step": 4, "loss": 2.25})
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == [
        "tasks/seconds",
        "tasks/words/acc",
        "train/loops",
        "train/loss",
        "valid/loss",
        "valid/wiki/loss",
    ]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 2.5), (4, 2.25)]
    assert [(e.step, e.value) for e in events.Scalars("valid/loss")] == [(3, 2.75)]


class FakeRun:
    def __init__(self, run_id: str) -> None:
        self.id = run_id
        self.summary: dict[str, float] = {}
        self.logged: list[dict[str, Any]] = []
        self.axes: dict[str, str] = {}
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, data: dict[str, Any]) -> None:
        self.logged.append(data)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("wandb")
    module.calls = []  # type: ignore[attr-defined]
    module.runs = []  # type: ignore[attr-defined]

    def init(**options: Any) -> FakeRun:
        module.calls.append(options)
        module.runs.append(FakeRun(options["id"] or "fresh-id"))
        return module.runs[-1]

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_curves_over_our_step(wandb: Any, tmp_path: Path) -> None:
    writer = WandbWriter("proj", "name", tmp_path / "run", {"a": 1})
    writer.write("resume", {"step": 0})
    writer.write("train", TRAIN)
    writer.advance(4)
    writer.write("summary", {"step": 9, "loss": 1.5, "paths": {}})
    writer.close()
    (call,) = wandb.calls
    assert (call["project"], call["name"], call["config"], call["id"]) == ("proj", "name", {"a": 1}, None)
    (run,) = wandb.runs
    assert run.axes["train/*"] == "step"
    assert run.logged == [{"step": 3, "train/loss": 2.5, "train/loops": 2.0}]
    assert run.summary == {"summary/loss": 1.5}
    assert run.finished


def test_wandb_continues_the_same_run(wandb: Any, tmp_path: Path) -> None:
    WandbWriter("proj", None, tmp_path)
    WandbWriter("proj", None, tmp_path)
    assert [call["id"] for call in wandb.calls] == [None, "fresh-id"]


def test_wandb_refusal_is_one_message(wandb: Any, tmp_path: Path) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError("api_key not configured")

    wandb.init = refuse
    with pytest.raises(ConfigError, match=r"refused project 'proj': api_key not configured.*WANDB_MODE=offline"):
        WandbWriter("proj", None, tmp_path)


@pytest.mark.parametrize(
    ("module", "make", "option"),
    [
        ("wandb", lambda path: WandbWriter("proj", None, path), "logging.wandb_project"),
        ("tensorboard.summary.writer.record_writer", TensorBoardWriter, "logging.tensorboard"),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, make: Any, option: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(ConfigError, match=f"{option} is set, but {package} cannot.*pip install {package}"):
        make(tmp_path)


def test_packages_are_looked_for_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_packages(LoggingConfig())
    with pytest.raises(ConfigError, match=r"logging.tensorboard is set.*pip install tensorboard"):
        check_packages(LoggingConfig(tensorboard=True))
    with pytest.raises(ConfigError, match=r"logging.wandb_project is set.*pip install wandb"):
        check_packages(LoggingConfig(wandb_project="p"))


def test_tensorboard_goes_on_in_a_new_file_when_its_folder_went(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = TensorBoardWriter(tmp_path / "tensorboard")
    writer.write("train", TRAIN)
    shutil.rmtree(tmp_path / "tensorboard")
    writer.write("train", {**TRAIN, "step": 4})
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [4]
