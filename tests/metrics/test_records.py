"""The declared fields of every kind of record are those that a run writes: no more, no fewer, of the declared types."""

from __future__ import annotations

import signal
import time
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest

from megatron_sgt.checkpoint.save import Saver
from megatron_sgt.config import Config
from megatron_sgt.engine.hooks.base import Hook, RunParts
from megatron_sgt.engine.hooks.straggler import MIN_STEPS, PATIENCE
from megatron_sgt.engine.hooks.tasks import TasksHook
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.errors import CheckpointError, DataError
from megatron_sgt.guard.stop import StopRequests
from megatron_sgt.jsonl import read_all
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.metrics.records import RECORDS
from tests.helpers.fp16_on_cpu import allow_fp16
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import pretrain, tiny_config, write_tiny_data

SAVED_AT, FULL_AT, SPIKE_AT, GROWN_AT = 4, 8, 7, 10
STOP_AT = PATIENCE * MIN_STEPS


class Mishaps(Hook):
    """Sees to it that everything happens that a run can report."""

    name = "mishaps"

    def __init__(self, stop: StopRequests) -> None:
        self.stop = stop
        self.spiked = False

    def attach(self, parts: RunParts) -> None:
        self.parts = parts

    def after_step(self, state: TrainState, result: StepResult) -> None:
        self.parts.hub.log("hook", {"step": state.step, "hook": self.name, "values": {"loss": float(result.loss)}})
        if state.step == STOP_AT:
            self.stop.receive(signal.SIGTERM)


def run_with_mishaps(info: RankInfo, config: Config) -> None:
    """A run in fp16 with a spike, a full disk, a slow rank and a request to stop; for ``run_on_ranks``."""
    allow_fp16()
    from megatron_sgt.model.core_attention import SGTCoreAttention
    from megatron_sgt.model.gpt import LanguageModel

    attend, forward, start = SGTCoreAttention.attend, LanguageModel.forward, Saver.start
    stop = StopRequests(config.train)
    run = PretrainingRun(config, info, stop, hooks=[Mishaps(stop)])
    spiked = []

    def slow(self: Any, *args: Any, **named: Any) -> Any:
        time.sleep(0.01 if info.rank == 1 else 0)
        return attend(self, *args, **named)

    def raised(self: Any, *args: Any, **named: Any) -> Any:
        loss = forward(self, *args, **named)
        if run.state.step == SPIKE_AT - 1 and len(spiked) < 2:  # both micro-batches of the step, the first time
            spiked.append(True)
            return 10.0 * loss
        return loss

    def full(self: Any, step: int, state: Any) -> None:
        if step == FULL_AT:
            raise CheckpointError("no space left")
        start(self, step, state)

    def answers(live: Any) -> dict[str, dict[str, float]]:
        if run.state.step == SAVED_AT:
            raise DataError("the data of words cannot be read")
        return {"words": {"acc": 0.5}}

    parts = run.stage.parts
    live: Any = SimpleNamespace(together=lambda work: work())
    at_the_end = TasksHook(parts.engine, live, answers, SAVED_AT // 2, parts.schedule, parts.hub, run.groups)
    run.stage.hooks.insert(-1, at_the_end)
    assert run.stage.eval is not None
    for one in run.stage.eval.sets:
        one._counter = SimpleNamespace(count_labels=lambda *_: 100)  # type: ignore[assignment]
    SGTCoreAttention.attend, LanguageModel.forward, Saver.start = slow, raised, full  # type: ignore[method-assign]
    run.train()


def start_again(info: RankInfo, config: Config) -> None:
    """A start that goes on from there and trains no step; for ``run_on_ranks``."""
    allow_fp16()
    PretrainingRun(config, info).hub.close()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Everything that the run wrote, what its rollback made void included."""
    folder = tmp_path_factory.mktemp("mishaps")
    data = write_tiny_data(folder)
    config = tiny_config(
        folder / "run",
        data,
        parallel={"zero_stage": 1},
        data={
            "seq_length_curriculum": [{"until_steps": 2, "seq_length": 8}],
            "valid": {"walks": data},
            "allow_validation_leak": True,
        },
        growth={
            "first_selection_step": 2,
            "window_size": 1,
            "stages": [{"until_steps": GROWN_AT, "operator": "midas", "options": {"block_size": 1}}],
        },
        train={
            "train_iters": STOP_AT + 2, "precision": "fp16", "eval_interval": 10, "straggler_threshold": 0.25,
            "spike_sigma": 8.0, "spike_window_steps": 4, "ema_decay": 0.75,
        },
        checkpoint={"save_interval": SAVED_AT, "keep_last": 1},
        deepspeed={"fp16": {"initial_scale_power": 4}},
    )  # fmt: skip
    (folder / "run").mkdir()
    (folder / "run" / "save_now").touch()
    run_on_ranks(2, run_with_mishaps, config)
    other_seed = config.train.model_copy(update={"seed": config.train.seed + 1})
    run_on_ranks(2, start_again, config.model_copy(update={"train": other_seed}))
    phased = tiny_config(folder / "phased", str(folder / "walks"), phases=[{}], train={"train_iters": 3})
    run_on_ranks(1, pretrain, phased)  # growth.stages have no phases
    first = {"load": str(config.save_dir / f"global_step{GROWN_AT}"), "start": "weights", "save": str(folder / "new")}
    new_run = config.checkpoint.model_copy(update=first)
    run_on_ranks(2, start_again, config.model_copy(update={"checkpoint": new_run}))
    damaged: list[int] = []
    found = read_all(folder / "run/metrics.jsonl", damaged)
    assert damaged == []
    return [
        *found,
        *(record for record in read_all(folder / "phased/metrics.jsonl", damaged) if record["kind"] == "phase"),
    ]


@pytest.mark.parametrize("kind", RECORDS)
def test_a_run_writes_what_is_declared(kind: str, records: list[dict[str, Any]]) -> None:
    ours = [{name: v for name, v in record.items() if name != "kind"} for record in records if record["kind"] == kind]
    declared = get_type_hints(RECORDS[kind])
    assert {name for record in ours for name in record} == set(declared)
    wrong = {name: value for record in ours for name, value in record.items() if not _is(value, declared[name])}
    assert wrong == {}


def test_no_kind_is_undeclared(records: list[dict[str, Any]]) -> None:
    assert {record["kind"] for record in records} == set(RECORDS)


def test_an_fp16_run_reports_its_loss_scale(records: list[dict[str, Any]]) -> None:
    assert [r["loss_scale"] for r in records if r["kind"] == "train"][:3] == [2.0**4] * 3


def _is(value: Any, wanted: Any) -> bool:
    """Whether ``value``, read from JSON, is of the declared type; an integer is a number, a path a text."""
    kind, inside = get_origin(wanted), get_args(wanted)
    if kind in (Union, types.UnionType):
        return any(_is(value, one) for one in inside)
    if kind in (list, tuple):
        return isinstance(value, list) and all(_is(item, inside[0]) for item in value)
    if is_typeddict(wanted):
        declared = get_type_hints(wanted)
        return isinstance(value, dict) and all(_is(item, declared.get(name, str)) for name, item in value.items())
    if kind is dict:
        return isinstance(value, dict) and all(_is(item, inside[1]) for item in value.values())
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str if wanted is Path else wanted)


def test_the_types_are_looked_at() -> None:
    assert _is([[1, 0.5]], list[list[float]]) and not _is([["1"]], list[list[float]])
    assert _is(None, float | None) and not _is(None, float) and not _is(True, float)
