"""The first and the last record of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sgt.config import Config
from megatron_sgt.config.run import HuggingFaceConfig
from megatron_sgt.engine import run_reports
from megatron_sgt.engine.run_reports import report_end, report_start
from megatron_sgt.engine.stage import Measured
from megatron_sgt.engine.step import TrainState
from megatron_sgt.errors import ExitCode
from megatron_sgt.preflight import Start
from megatron_sgt.stages.stages import stages_of
from tests.helpers.fake_groups import fake_groups
from tests.helpers.sentencepieces import UNLIKE_ANY, train
from tests.helpers.single import small_config

CONFIG = small_config()


class Hub(list[Any]):
    """Keeps the records."""

    def log(self, kind: str, record: dict[str, Any]) -> None:
        self.append((kind, record))


def session(hub: Hub, config: Config = CONFIG) -> Any:
    ledger = SimpleNamespace(tokens=lambda samples: samples * 32)
    about = {"config": config, "stages": stages_of(config), "ledger": ledger}
    return SimpleNamespace(**about, state=TrainState(6, 12), hub=hub, groups=fake_groups())


def stage(first: float | None = 5.0) -> Any:
    events = [{"action": action} for action in ("select", "grow", "fix")]  # growth of the model is none of the schedule
    measured = Measured(first, 4.0, 4.5, None, {}, 100.0, {}, None, events)
    return SimpleNamespace(config=CONFIG, measured=lambda: measured, runtime=SimpleNamespace(precision="fp32"))


def test_the_last_record() -> None:
    hub = Hub()
    report_end(session(hub), stage(), Start(None, {}), "finished", ExitCode.DONE, 2.0)
    report_end(session(hub), stage(), Start(Path("global_step2"), {}), "finished", ExitCode.DONE, 2.0)
    (kind, fresh), (_, resumed) = hub
    assert kind == "summary" and (fresh["first_loss"], resumed["first_loss"]) == (5.0, None)
    assert fresh["growth_events"] == 2 and fresh["consumed_tokens"] == 12 * 32 and "valid_ema_loss" not in fresh
    assert resumed["paths"]["checkpoint"] == Path("global_step2") and fresh["paths"]["checkpoint"] is None


def test_the_first_record(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hub = Hub()
    start = Start(Path("global_step2"), {}, ("train.seed 1 -> 2",))
    report_start(session(hub), stage(), start, None)
    [(kind, record)] = hub
    assert kind == "resume" and record["changed"] == start.changed and capsys.readouterr().out == ""
    monkeypatch.setattr(run_reports, "loop_backend", lambda *_: ("torch", "some kernels"))
    on_gpu = session(hub)
    on_gpu.groups = SimpleNamespace(is_main=True, tp_size=1, world_size=1, device=torch.device("meta"))
    monkeypatch.setattr(run_reports, "describe_attention", lambda device: "an attention")
    report_start(on_gpu, stage(), start, None)
    assert capsys.readouterr().out == "LOOPS  some kernels; an attention\n"


def test_each_start_warns_of_a_tokenizer_that_cannot_be_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for bytes_too in (True, False):
        model = train(tmp_path / "m.model", **{**UNLIKE_ANY, "byte_fallback": bytes_too})
        run = stage()
        run.config = small_config(data={"tokenizer": {"type": "sentencepiece", "model": str(model)}})
        report_start(session(Hub()), run, Start(None, {}), None)
        said = capsys.readouterr().out
        assert said.startswith("WARNING  the tokenizer has no form in transformers, fast or slow") != bytes_too
        assert said.count("\n") == (0 if bytes_too else 1)
    run.config = run.config.model_copy(update={"huggingface": HuggingFaceConfig(check_at_start="off")})
    report_start(session(Hub()), run, Start(None, {}), None)
    assert capsys.readouterr().out == ""


def test_each_start_tells_the_stages_to_come(capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(growth={"stages": [{"until_steps": 7, "operator": "g_stack", "options": {"factor": 2}}]})
    report_start(session(Hub(), config), stage(), Start(Path("global_step2"), {}), None)
    said = capsys.readouterr().out
    assert said.startswith("STAGES  4 layers, ") and "g_stack after step 7: 8 layers" in said


def test_each_start_tells_how_a_pipeline_cuts_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(parallel={"pipeline_model_parallel_size": 2})
    run = session(Hub(), config)
    run.groups = replace(run.groups, world_size=2)
    report_start(run, stage(), Start(Path("global_step2"), {}), None)
    assert capsys.readouterr().out.startswith("PIPELINE  2,2 layers · largest stage over the mean +")
