"""A model that grows in a running process is, bit for bit, the one of a new process that starts at the boundary.

The new process continues a run that train.exit_interval has stopped there. Losses, norms, learning rates, loops, own
hooks and every bit of the checkpoints (fp32 masters, moments, the average, random streams) must be the same.
"""

from __future__ import annotations

import gc
import weakref
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint.layout import STATE_FILE, read_json
from megatron_sgt.config import Config
from megatron_sgt.engine.hooks.base import Hook, RunParts
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.exhaustive import share_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import differing_leaves, measured_steps, pretrain, reported, write_tiny_data
from tests.helpers.staged import (
    DECIDES,
    END,
    FIRST,
    INSIDE,
    LAST,
    SECOND,
    grow_records,
    looping_config,
    pretrain_counting,
    staged_config,
)

Case = tuple[str, int, int, str]
"""Kind of run, tensor-parallel size, ZeRO stage, precision."""
KINDS = {"looping": (INSIDE, DECIDES, END), "msg_all": (FIRST, SECOND, LAST), "auto_prog_ema": (FIRST, SECOND, LAST)}
EVERY: list[Case] = [
    *((kind, tp_size, zero, "fp32") for kind, tp_size, zero in product(KINDS, (1, 2), range(4))),
    *(("looping", 1, zero, "bf16") for zero in (1, 2, 3)),
]
SHARE: list[Case] = [("looping", 1, 3, "bf16"), ("msg_all", 2, 1, "fp32")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def config_of(case: Case, run_dir: Path, data: str, stop: int | None = None) -> Config:
    """Two ranks. ZeRO is kept where there is one data-parallel rank; half of the runs save beside training."""
    kind, tp_size, zero, precision = case
    stages = {"stage": zero, "stage3_param_persistence_threshold": 0} if zero else {}
    sections: dict[str, dict[str, Any]] = {
        "parallel": {"tensor_model_parallel_size": tp_size, "zero_stage": zero, "device": "cpu"},
        "deepspeed": {"zero_optimization": stages} if zero else {},
        "train": {"exit_interval": stop, "precision": precision},
        "checkpoint": {"save_interval": 2, "keep_last": 0, "async_save": zero % 2 == 1},
    }
    if kind == "looping":
        return looping_config(run_dir, data, **sections)
    return staged_config(run_dir, data, kind, **sections)


def states(run_dir: Path, step: int) -> dict[str, Any]:
    return read_json(run_dir / f"checkpoints/global_step{step}" / STATE_FILE)


@pytest.mark.parametrize(("kind", "tp_size", "zero", "precision"), share_of(EVERY, SHARE))
def test_grown_in_the_process_is_grown_in_a_new_one(
    kind: str, tp_size: int, zero: int, precision: str, data: str, tmp_path: Path
) -> None:
    case = (kind, tp_size, zero, precision)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first, second, last = KINDS[kind]
    run_on_ranks(2, pretrain_counting, config_of(case, whole, data))
    for stop in (first, second, None):
        run_on_ranks(2, pretrain_counting, config_of(case, parts, data, stop))
    assert [record["step"] for record in reported(parts, "resume")] == [0, first, second]
    expected, found = measured_steps(whole), measured_steps(parts)
    assert [step["step"] for step in expected] == list(range(1, last + 1))
    for one, other in zip(expected, found, strict=True):
        assert one == other
    assert reported(parts, "growth") == reported(whole, "growth")
    assert grow_records(parts) == grow_records(whole)
    assert list(grow_records(whole)) == [first, second]
    for step in (first, second, second + 2 - second % 2, last):
        folder = f"checkpoints/global_step{step}"
        assert differing_leaves(whole / folder, parts / folder) == [], step
        assert states(whole, step) == states(parts, step)
    layers = states(whole, last)["hooks"]["counting"]["layers"]
    assert len(layers) == last and len(set(layers)) > 1, "an own hook sees every model"
    if kind == "looping":
        assert sum(expected[-1]["loop_depth"]) >= 2 and expected[first]["other_gates"], "inside a window"


LAYOUTS = {"tp1_dp2_zero3": (1, 2, 3), "tp1_zero0": (1, 1, 0), "tp2_zero2": (2, 1, 2), "tp1_dp2_zero1": (1, 2, 1)}
ELSEWHERE = list(product(("g_stack", "msg_all", "auto_prog_ema", "compound_grow_noise"), LAYOUTS))


@pytest.mark.parametrize(("method", "name"), share_of(ELSEWHERE, [("msg_all", "tp1_dp2_zero3")]))
def test_a_boundary_at_one_layout_is_passed_at_another(method: str, name: str, data: str, tmp_path: Path) -> None:
    """Two tensor-parallel ranks with ZeRO 1 up to the first boundary; elsewhere past the second, and back again."""
    zero = {"zero_optimization": {"stage": 1}}
    here = {"parallel": {"tensor_model_parallel_size": 2, "zero_stage": 1, "device": "cpu"}, "deepspeed": zero}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_on_ranks(2, pretrain, staged_config(whole, data, method, **here))
    run_on_ranks(2, pretrain, staged_config(parts, data, method, **here, train={"exit_interval": FIRST}))
    tp_size, dp_size, stage = LAYOUTS[name]
    parallel = {"tensor_model_parallel_size": tp_size, "zero_stage": stage, "device": "cpu"}
    elsewhere = {"parallel": parallel, "deepspeed": {"zero_optimization": {"stage": stage}} if stage else {}}
    stop = {"train": {"exit_interval": SECOND + 1}}
    run_on_ranks(tp_size * dp_size, pretrain, staged_config(parts, data, method, **elsewhere, **stop))
    run_on_ranks(2, pretrain, staged_config(parts, data, method, **here))
    for one, other in zip(measured_steps(whole), measured_steps(parts), strict=True):
        assert other["step"] == one["step"] and other["lr"] == one["lr"]
        assert other["consumed_samples"] == one["consumed_samples"]
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


REBUILDS = 5


class Alive(Hook):
    """Counts tensors that are alive in each stage, and the engines and models of the stages before."""

    name = "alive"

    def __init__(self) -> None:
        self.made: list[tuple[weakref.ref[Any], weakref.ref[Any]]] = []
        self.tensors: list[int] = []
        self.loops: list[int] = []
        self.begun = 0

    def attach(self, parts: RunParts) -> None:
        self.parts = parts
        self.made.append((weakref.ref(parts.engine), weakref.ref(parts.model)))

    def before_run(self, state: TrainState) -> None:
        self.begun = state.step

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if state.step != self.begun + 2:
            return
        gc.collect()
        self.tensors.append(sum(isinstance(one, torch.Tensor) for one in gc.get_objects()))
        self.loops.append(sum(self.parts.schedule.plan.loops))
        assert all(old() is None for pair in self.made[:-1] for old in pair), "an old engine or model is alive"


def count_alive(info: RankInfo, config: Config) -> tuple[list[int], list[int], int]:
    """Tensors and loops in each stage; how many engines there were."""
    hook = Alive()
    PretrainingRun(config, info, hooks=[hook]).train()
    return hook.tensors, hook.loops, len(hook.made)


@pytest.mark.parametrize(("tp_size", "zero"), share_of(product((1, 2), range(4)), []))
def test_nothing_is_left_of_the_engines_before(tp_size: int, zero: int, data: str, tmp_path: Path) -> None:
    """Sparse loops included, which hold weights of their own."""
    stages = [
        {"until_steps": 5 + 3 * n, "operator": "msg", "options": {"ffn_hidden_size": 56 + 8 * n}}
        for n in range(REBUILDS)
    ]
    loops = {"first_selection_step": 1, "window_size": 1, "max_selected_layers": 1, "max_loop_depth": 1}
    config = looping_config(
        tmp_path,
        data,
        growth={"stages": stages, **loops},
        train={"train_iters": 5 + 3 * REBUILDS},
        parallel={"tensor_model_parallel_size": tp_size, "zero_stage": zero, "device": "cpu"},
        deepspeed={"zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0}} if zero else {},
    )
    for tensors, passes, engines in run_on_ranks(2, count_alive, config):
        assert engines == 1 + REBUILDS == len(tensors)
        assert len(set(tensors[1:])) == 1, tensors
        assert passes[1:] == [1] * REBUILDS
