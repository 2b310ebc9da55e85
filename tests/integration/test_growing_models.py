"""Training goes on from a grown checkpoint: as plain PyTorch does, and the same under every layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint.reshard.engine_state import load_into_engine
from megatron_sgt.checkpoint.reshard.rank_state import MOMENTS, WEIGHTS
from megatron_sgt.checkpoint.surgery.offline import grow_checkpoint
from megatron_sgt.checkpoint.surgery.reader import GrownReader, open_any
from megatron_sgt.config import Config, load_config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.step import train_step
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.stages.operators import OPERATORS
from megatron_sgt.stages.optimizer import OptimizerPolicy, carry
from tests.helpers.deepspeed_files import STEP, State, odd_config, random_state, write_checkpoint
from tests.helpers.growing import logits
from tests.helpers.ranks import run_on_ranks
from tests.helpers.reference_growth import in_order, split_units, wider
from tests.helpers.runs import measured_steps, pretrain, tiny_config, write_tiny_data
from tests.helpers.single import random_batch

LR, STEPS, SEED = 1e-3, 4, 11
Layout = tuple[int, int, int]
"""Tensor-parallel size, data-parallel size, ZeRO stage."""
METHODS: dict[str, tuple[str, dict[str, Any], str, str, list[Layout]]] = {
    "g_stack": ("g_stack", {"factor": 2}, "fresh", "fresh", [(1, 2, 1)]),
    "midas": ("midas", {"block_size": 1}, "copy", "continue", [(2, 1, 0)]),
    "compound_grow": ("compound_grow", {"factor": 2, "noise": 0.0}, "scaled", "rewind(3)", [(1, 1, 0)]),
    "msg": ("msg", {"hidden_size": 32, "ffn_hidden_size": 28}, "scaled", "continue", [(2, 1, 1), (1, 2, 3)]),
}
"""Operator, options, what becomes of moments and step, layouts."""


def small_state() -> State:
    """Weights and moments as after some training: squares are positive, and larger than those of the means."""
    state = random_state(odd_config())
    state[WEIGHTS] = {name: 0.3 * tensor for name, tensor in state[WEIGHTS].items()}
    state["exp_avg_sq"] = {name: 1e-4 + (0.02 * tensor) ** 2 for name, tensor in state["exp_avg_sq"].items()}
    state["exp_avg"] = {name: 0.005 * tensor for name, tensor in state["exp_avg"].items()}
    return state


def engine_config(model: ModelConfig, where: Layout) -> Config:
    """Two micro-batches on each of two data-parallel ranks, four on one."""
    layout = {"tensor_model_parallel_size": where[0], "zero_stage": where[2]}
    train = {"micro_batch_size": 1, "global_batch_size": 4}
    return odd_config({"parallel": layout, "train": train, "optim": {"lr": LR}}, **model.model_dump())


def on_ranks(info: RankInfo, config: Config, folder: Path, method: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of this rank's steps from the grown checkpoint."""
    groups = start_processes(config, info)
    engine = build_runtime(config, groups).engine
    name, options, moments, optimizer, _ = METHODS[method]
    opened = open_any(folder)
    growth = OPERATORS[name](opened.config.model, options)
    carried = carry(opened.step, OptimizerPolicy.parse(optimizer), moments, config.optim, True)
    reader = GrownReader(opened.tensors, growth, carried, SEED, stage=1)
    load_into_engine(reader, carried.step, None, config, engine, groups)
    found = []
    for step in range(STEPS):
        count = config.num_micro_batches(groups.world_size)
        seeds = [100 * step + groups.dp_rank * count + index for index in range(count)]
        result = train_step(engine, [random_batch(config, seed) for seed in seeds], LR, config.optim.clip_grad, groups)
        found.append((float(result.loss), result.grad_norm))
    return found


def reference_state(method: str, model: ModelConfig, drawn: dict[str, torch.Tensor]) -> tuple[State, int]:
    """The grown state by slices of tensors, and AdamW's step; new entries of weights are ``drawn``."""
    old = small_state()
    if method == "g_stack":
        return {WEIGHTS: in_order(old[WEIGHTS], [0, 1, 0, 1]), **{m: {} for m in MOMENTS}}, 0
    if method == "midas":
        return {quantity: in_order(old[quantity], [0, 0, 1]) for quantity in old}, STEP
    if method == "msg":
        new: State = {WEIGHTS: wider(old[WEIGHTS], 32, 28, drawn, 6, (4, 1))}
        for moment, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            ratio = (32 / 24) ** (power / 2)
            new[moment] = {}
            for name, tensor in old[moment].items():
                padded = torch.zeros_like(new[WEIGHTS][name])
                normed = "layernorm" in name or name == "model.norm.weight" or "q_proj" in name or "k_proj" in name
                padded[tuple(slice(size) for size in tensor.shape)] = tensor * (ratio if normed else 1)
                new[moment][name] = padded
        return new, STEP
    new = {quantity: split_units(tensors, 2) for quantity, tensors in old.items()}
    for moment, beta, power in (("exp_avg", 0.9, 1), ("exp_avg_sq", 0.95, 2)):
        factor = (1 - beta**3) / (1 - beta**STEP)
        for name, tensor in old[moment].items():
            ups = "gate_proj" in name or "up_proj" in name
            again = torch.cat([tensor / 2**power] * 2) if ups else tensor
            new[moment][name] = factor * (torch.cat([tensor] * 2, dim=1) if "down_proj" in name else again)
    return new, 3


def by_reference(method: str, config: Config, drawn: dict[str, torch.Tensor]) -> list[tuple[float, float]]:
    """The same steps in plain PyTorch, in one process."""
    state, step = reference_state(method, config.model, drawn)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state[WEIGHTS].items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for name, leaf in leaves.items() if step else ():
        moments = {moment: state[moment][name].clone() for moment in MOMENTS}
        optimizer.state[leaf] = {"step": torch.tensor(float(step)), **moments}
    found = []
    for number in range(STEPS):
        losses = []
        for index in range(4):
            batch = random_batch(config, 100 * number + index)
            scores = logits(leaves, config.model, batch["tokens"])
            losses.append(torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten()))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
        optimizer.step()
        found.append((float(loss.detach()), float(norm)))
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two tensor-parallel ranks."""
    return write_checkpoint(tmp_path_factory.mktemp("source"), odd_config(), small_state(), (2, 1, 1))


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_plain_pytorch(method: str, source: Path) -> None:
    name, options, *_ = METHODS[method]
    opened = open_any(source)
    growth = OPERATORS[name](opened.config.model, options)
    fresh = carry(0, OptimizerPolicy.parse("fresh"), "fresh", opened.config.optim, True)
    reader = GrownReader(opened.tensors, growth, fresh, SEED, stage=1)
    drawn = {n: t for one in reader.parameters() for n, t in reader.whole(one, WEIGHTS).items()}
    expected = by_reference(method, engine_config(growth.new, (1, 1, 0)), drawn)
    for where in METHODS[method][4]:
        ranks = run_on_ranks(where[0] * where[1], on_ranks, engine_config(growth.new, where), source, method)
        for number, (loss, norm) in enumerate(expected):
            found = sum(rank[number][0] for rank in ranks) / len(ranks)
            assert found == pytest.approx(loss, abs=3e-5), (where, number)
            assert ranks[0][number][1] == pytest.approx(norm, rel=1e-5), (where, number)


RUN: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 4},
    "growth": {"first_selection_step": 2, "window_size": 4, "top_k_layers": 3, "max_selected_layers": 2},
    "train": {"train_iters": 10, "exit_interval": 5, "micro_batch_size": 1, "global_batch_size": 4, "eval_interval": 0},
    "parallel": {"tensor_model_parallel_size": 2, "zero_stage": 1},
    "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
}


@cache
def grown_run(root: Path) -> Path:
    """A run on two tensor-parallel ranks that stops inside a window, and its checkpoint grown."""
    run_on_ranks(2, pretrain, tiny_config(root / "run", write_tiny_data(root), **RUN))
    done = grow_checkpoint(root / "run/checkpoints", root / "grown", OPERATORS["midas"], {"block_size": 2})
    return done.config_file


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grown")


def continued(root: Path, where: Layout) -> list[dict[str, Any]]:
    """The steps of the run that goes on under another layout."""
    tp_size, dp_size, stage = where
    folder = root / f"{tp_size}{dp_size}{stage}"
    layout = [f"parallel.tensor_model_parallel_size={tp_size}", f"parallel.zero_stage={stage}"]
    run = [f"logging.run_dir={folder}", "train.exit_interval=null"]
    run_on_ranks(tp_size * dp_size, pretrain, load_config(grown_run(root), [*run, *layout]))
    return measured_steps(folder)


def test_a_looping_run_grows_at_one_layout_and_goes_on_at_another(root: Path) -> None:
    before = measured_steps(grown_run(root).parents[1] / "run")
    steps = continued(root, (2, 1, 1))
    assert [step["step"] for step in steps] == [6, 7, 8, 9, 10]
    assert steps[0]["consumed_samples"] == before[-1]["consumed_samples"] + 4, "no sequence twice, none left out"
    (old,) = [layer for layer, loops in enumerate(before[-1]["loop_depth"]) if loops]
    (heir,) = [
        layer for layer, loops in enumerate(steps[0]["loop_depth"]) if loops and len(steps[0]["loop_depth"]) == 6
    ]
    assert heir == old + (2 if old > 1 else 0), "layers 0 and 1 stand twice; the originals come first"
    assert steps[0]["phase"] == before[-1]["phase"] == "selecting"
    for where in ((1, 2, 3), (1, 1, 0)):
        for step, other in zip(steps, continued(root, where), strict=True):
            assert other["loss"] == pytest.approx(step["loss"], abs=1e-5)
            assert other["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)
            assert other["loop_depth"] == step["loop_depth"]
