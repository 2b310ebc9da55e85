"""A run of three stages: what a process that starts at a boundary does, what stops, kills and rollbacks leave."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.save import Saver
from megatron_sgt.config import Config
from megatron_sgt.engine.hooks.base import Hook, RunParts
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.errors import CheckpointError, ExitCode
from megatron_sgt.guard.stop import StopRequests
from megatron_sgt.jsonl import read_all
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.metrics import METRICS_FILE
from megatron_sgt.model.gpt import LanguageModel
from tests.helpers.exhaustive import share_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import differing_leaves, measured_steps, reported, tiny_config, write_tiny_data

FIRST, SECOND, END = 4, 8, 12
STAGES = [
    {"until_steps": FIRST, "operator": "midas", "options": {"block_size": 2}, "lr_policy": "rewarm(2)"},
    {
        "until_steps": SECOND, "operator": "msg", "options": {"ffn_hidden_size": 64}, "moments": "seeded",
        "optimizer": "rewind(3)",
    },
]  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {"zero_stage": 0}),
    "tensor_parallel": (2, {"zero_stage": 1, "tensor_model_parallel_size": 2}),
    "zero_3": (2, {"zero_stage": 3}),
}


class Counter(Hook):
    """Counts applied steps, ends of stages, models and layers; may ask the run to stop."""

    name = "counter"

    def __init__(self, stop: StopRequests, stop_at: Callable[[Counter, str], bool]) -> None:
        self.stop, self.stop_at = stop, stop_at
        self.steps, self.ends, self.models, self.layers = 0, 0, 0, 0

    def attach(self, parts: RunParts) -> None:
        self.models, self.layers = self.models + 1, parts.config.model.num_layers
        self._stop("attach")

    def after_step(self, state: TrainState, result: StepResult) -> None:
        self.steps += result.applied
        self._stop("step")

    def after_stage(self, state: TrainState) -> None:
        self.ends += 1

    def _stop(self, where: str) -> None:
        if self.stop_at(self, where):
            self.stop.receive(signal.SIGTERM)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "ends": self.ends}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.ends = state["steps"], state["ends"]


def settings(root: Path, name: str, parallel: dict[str, Any], **sections: dict[str, Any]) -> Config:
    train = {"train_iters": END, "eval_interval": 3, "ema_decay": 0.9, **sections.pop("train", {})}
    return tiny_config(
        root / name,
        data_of(root),
        model={"num_layers": 4, "hidden_dropout": 0.1, "attention_dropout": 0.1},
        parallel=parallel,
        growth={"top_k_layers": 2, "stages": STAGES},
        train=train,
        checkpoint={"keep_last": 0, **sections.pop("checkpoint", {})},
        **sections,
    )


@cache
def data_of(root: Path) -> str:
    return write_tiny_data(root)


def never(hook: Counter, where: str) -> bool:
    return False


def at_the_boundary(hook: Counter, where: str) -> bool:
    return where == "step" and hook.steps == FIRST


def inside_the_boundary(hook: Counter, where: str) -> bool:
    return where == "attach" and hook.models == 2


def before_the_boundary(hook: Counter, where: str) -> bool:
    return where == "step" and hook.steps == FIRST - 1


def train(info: RankInfo, config: Config, stop_at: Callable[[Counter, str], bool] = never) -> tuple[int, int, int, int]:
    """Exit code, and what the hook has counted."""
    stop = StopRequests(config.train)
    hook = Counter(stop, stop_at)
    code = PretrainingRun(config, info, stop, hooks=[hook]).train()
    return code, hook.steps, hook.models, hook.layers


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@cache
def whole(root: Path, where: str) -> Path:
    """An uninterrupted run of LAYOUTS[where] that keeps every checkpoint; its folder."""
    ranks, parallel = LAYOUTS[where]
    told = run_on_ranks(ranks, train, settings(root, where, parallel))
    assert told == [(0, END, 3, 6)] * ranks, "the user's hook saw three models, and its state went on"
    return root / where


def same(one: Path, other: Path, after: int = 0) -> None:
    """The steps after ``after`` and the last checkpoints of two runs are equal, bit for bit."""
    steps = [step for step in measured_steps(one) if step["step"] > after]
    assert [step["step"] for step in steps] == list(range(after + 1, END + 1))
    assert measured_steps(other)[-len(steps) :] == steps
    last = [folder / "checkpoints" / layout.tag_for(END) for folder in (one, other)]
    assert differing_leaves(*last) == []
    states = [json.loads((folder / layout.STATE_FILE).read_text()) for folder in last]
    assert states[0] == states[1]


@pytest.mark.parametrize("where", share_of(LAYOUTS, ["alone", "tensor_parallel"]))
def test_a_fresh_process_goes_on_like_the_running_one(where: str, root: Path) -> None:
    ranks, parallel = LAYOUTS[where]
    one, name = whole(root, where), f"{where}_again"
    begin = one / "checkpoints" / layout.tag_for(FIRST)
    run_on_ranks(ranks, train, settings(root, name, parallel, checkpoint={"load": str(begin)}))
    same(one, root / name, after=FIRST)
    grown = [reported(folder, "grow") for folder in (one, root / name)]
    assert [record["stage"] for record in grown[0]] == [1, 2]
    (here, preserving), (there, _) = grown[0], grown[1]
    assert there == {**here, "probe_loss_before": None}
    assert preserving["probe_loss_before"] == pytest.approx(preserving["probe_loss_after"], abs=1e-5)
    assert abs(here["probe_loss_before"] - here["probe_loss_after"]) > 1e-3


def test_what_a_boundary_leaves(root: Path) -> None:
    one = whole(root, "alone")
    tags = layout.finished_tags(one / "checkpoints")
    assert tags == [layout.tag_for(step) for step in (FIRST, SECOND, END)], "saved though the interval is 0"
    shapes = []
    for ends, tag in zip((1, 2, 2), tags, strict=True):
        state = json.loads((one / "checkpoints" / tag / layout.STATE_FILE).read_text())
        shapes.append(len(state.get(layout.STAGES_STATE, [])))
        assert state["hooks"]["counter"] == {"steps": state["trainer"]["step"], "ends": ends}
    assert shapes == [0, 1, 2]
    assert [record["step"] for record in reported(one, "valid")] == [3, 6, 9, 12], "none more at a boundary"
    rates = [step["lr"] for step in measured_steps(one)]
    again = [step["lr"] for step in measured_steps(whole(root, "tensor_parallel"))]
    assert rates == again and rates[FIRST] == pytest.approx(rates[FIRST + 1] / 2, rel=0.2)


def test_another_layout_goes_on_with_the_same_numbers(root: Path) -> None:
    run_on_ranks(1, train, tiny_config(root / "plain", data_of(root), **PLAIN))
    ranks, parallel = LAYOUTS["tensor_parallel"]
    load = {"load": str(root / "plain/checkpoints" / layout.tag_for(FIRST))}
    run_on_ranks(
        ranks, train, tiny_config(root / "cut", data_of(root), **{**PLAIN, "parallel": parallel, "checkpoint": load})
    )
    for step, other in zip(measured_steps(root / "cut"), measured_steps(root / "plain")[FIRST:], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


PLAIN: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 4},
    "growth": {"top_k_layers": 2, "stages": STAGES},
    "train": {"train_iters": END, "eval_interval": 0},
    "checkpoint": {"keep_last": 0},
}


@pytest.mark.parametrize(
    ("stop_at", "counted"),
    [(before_the_boundary, (FIRST - 1, 1)), (at_the_boundary, (FIRST, 1)), (inside_the_boundary, (FIRST, 2))],
)
def test_a_request_to_stop_near_a_boundary(
    stop_at: Callable[[Counter, str], bool], counted: tuple[int, int], root: Path
) -> None:
    name = stop_at.__name__
    config = settings(root, name, LAYOUTS["alone"][1], checkpoint={"keep_last": 1, "async_save": True})
    [(code, steps, models, _)] = run_on_ranks(1, train, config, stop_at)
    assert (code, steps, models) == (ExitCode.SAVED, *counted)
    assert layout.finished_tags(root / name / "checkpoints") == [layout.tag_for(steps)]
    (stopped,), (summary,) = reported(root / name, "stop"), reported(root / name, "summary")
    assert stopped["step"] == summary["step"] == steps and summary["paths"]["checkpoint"].endswith(
        layout.tag_for(steps)
    )
    [(code, steps, models, _)] = run_on_ranks(1, train, config)
    assert (code, steps) == (0, END)
    same(whole(root, "alone"), root / name)
    assert [record["stage"] for record in reported(root / name, "grow")] == [1, 2], "none before it has stopped"


def test_a_run_may_be_cut_at_a_boundary(root: Path) -> None:
    for end, models in ((FIRST, 1), (FIRST, 1), (None, 3)):
        save = {"save_interval": FIRST}  # the hook's count of ends is the same whatever it is
        config = settings(root, "cut_there", LAYOUTS["alone"][1], train={"exit_interval": end}, checkpoint=save)
        [told] = run_on_ranks(1, train, config)
        assert told == (0, end or END, models - (end is None), 4 if end else 6)
    same(whole(root, "alone"), root / "cut_there")
    assert [record["stage"] for record in reported(root / "cut_there", "grow")] == [1, 2], "none with nothing to do"


def full_disk(info: RankInfo, config: Config) -> str:
    """Of a run whose save at the first boundary fails."""
    start = Saver.start

    def failing(self: Saver, step: int, state: dict[str, Any]) -> None:
        if step == FIRST:
            raise CheckpointError("no space left")
        start(self, step, state)

    Saver.start = failing  # type: ignore[method-assign]
    try:
        train(info, config)
    except CheckpointError as error:
        return str(error)
    return ""


def test_without_the_save_at_a_boundary_the_run_ends(root: Path) -> None:
    config = settings(root, "full", LAYOUTS["alone"][1], checkpoint={"save_interval": FIRST - 1})
    assert run_on_ranks(1, full_disk, config) == ["no space left"]
    assert layout.finished_tags(root / "full/checkpoints") == [layout.tag_for(FIRST - 1)]
    run_on_ranks(1, train, settings(root, "full", LAYOUTS["alone"][1]))
    same(whole(root, "alone"), root / "full")


def spiking(info: RankInfo, config: Config, damage: bool) -> tuple[int, int, int, int, list[float]]:
    """A run whose loss spikes in the second step of stage 1; ``damage``: its boundary checkpoint cannot be read.

    Returns, beside what ``train`` does, how many times as large each model's checkpoints were said to be.
    """
    forward, stop = LanguageModel.forward, StopRequests(config.train)
    hook = Counter(stop, never)
    run = PretrainingRun(config, info, stop, hooks=[hook])
    spiked, times = list[bool](), list[float]()
    stop.expect_saves = times.append  # type: ignore[method-assign]

    def raised(self: Any, *args: Any, **named: Any) -> Any:
        loss = forward(self, *args, **named)
        if run.state.step == FIRST + 1 and self.training and len(spiked) < 4:  # all micro-batches of one step
            spiked.append(True)
            if damage:
                (config.save_dir / layout.tag_for(FIRST) / "mp_rank_00_model_states.pt").unlink(missing_ok=True)
            return 10.0 * loss
        return loss

    LanguageModel.forward = raised  # type: ignore[method-assign]
    return run.train(), hook.steps, hook.models, hook.layers, times


@pytest.mark.parametrize("damage", [False, True])
def test_a_rollback_goes_back_to_an_earlier_stage_if_it_must(damage: bool, root: Path) -> None:
    # The loss does not jump where this model grows, so that the window of losses is kept.
    stage = {"until_steps": FIRST, "operator": "msg", "options": {"num_layers": 5}}
    name = f"spike_{damage}"
    config = tiny_config(
        root / name,
        data_of(root),
        model={"num_layers": 4},
        growth={"top_k_layers": 2, "stages": [stage]},
        train={"train_iters": END, "eval_interval": 0, "spike_sigma": 50.0, "spike_window_steps": FIRST},
        checkpoint={"save_interval": FIRST - 2},
    )
    [(code, steps, models, layers, times)] = run_on_ranks(1, spiking, config, damage)
    # Stages 0 and 1, and 1 again; with the boundary's checkpoint gone 0 and 1 again.
    assert (code, steps, models, layers) == (0, END, 4 if damage else 3, 5)
    assert len(times) == models - 1 and math.prod(times) == pytest.approx(times[0]) and times[0] > 1
    (back,) = reported(root / name, "rollback")
    assert back["spike_step"] == FIRST + 2 and back["step"] == (FIRST - 2 if damage else FIRST)
    records = read_all(root / name / METRICS_FILE, [])
    assert [r["step"] for r in records if r["kind"] == "grow"] == [FIRST, FIRST]
