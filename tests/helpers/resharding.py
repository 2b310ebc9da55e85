"""The run that the tests of resharding save and resume, and what their ranks do; for ``run_on_ranks``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from megatron_sgt.checkpoint.layout import STATE_FILE, read_json
from megatron_sgt.checkpoint.load import load_checkpoint, load_weights
from megatron_sgt.checkpoint.reshard.engine_state import load_into_engine
from megatron_sgt.checkpoint.reshard.layout_free import LayoutFreeReader, ShardReader
from megatron_sgt.checkpoint.reshard.rank_state import MOMENTS, WEIGHTS
from megatron_sgt.checkpoint.save import Saver
from megatron_sgt.config import Config
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.hooks.ema import EmaHook
from megatron_sgt.engine.step import train_step
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.parallel.groups import ParallelGroups
from tests.helpers.single import random_batch

INSIDE, AFTER = 3, 12
"""Steps that are saved: in the middle of the first window, and when the structure is fixed."""
STEPS = 10
TOLERANCE = 1e-5
BF16_TOLERANCE = 2e-2
"""Two layouts round gradients of 8 bits differently, and ten steps of AdamW amplify that; measured: up to 4e-3."""

BASE: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 4},
    "growth": {
        "first_selection_step": 2, "window_size": 2, "num_keep_heads": 2, "top_k_layers": 3,
        "max_selected_layers": 2, "max_loop_depth": 2,
    },
    "train": {
        "train_iters": AFTER + STEPS, "micro_batch_size": 1, "global_batch_size": 6, "eval_interval": 0,
    },
    "checkpoint": {"save_interval": INSIDE, "keep_last": 0},
    # Without it, ZeRO 3 keeps weights as small as these whole on every rank.
    "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
}  # fmt: skip
EVERYWHERE: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "two_groups": {"optim": {"weight_decay_on": "matrices", "weight_decay": 0.5}},
    "bf16": {"train": {"precision": "bf16"}},
    "dropout": {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}},
}
"""Variants of this run that are resharded with a pipeline and without."""


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """``one`` with the values of ``other`` on top, section within section."""
    return {
        key: merged(one[key], other[key])
        if isinstance(one.get(key), dict) and isinstance(other.get(key), dict)
        else other.get(key, one.get(key))
        for key in {**one, **other}
    }


def load_and_look(info: RankInfo, config: Config, folder: Path, steps_before: int = 0) -> dict[str, Any]:
    """Load a layout-free ``folder`` and return the state as DeepSpeed's own getters see it.

    steps_before: optimizer steps taken before loading. ``norm`` is of a step taken after all.
    """
    groups = start_processes(config, info)
    engine = build_runtime(config, groups).engine
    for _ in range(steps_before):
        _step(engine, config, groups)
    settings = _settings(engine)
    made = read_json(folder / STATE_FILE)["layout_free"]
    load_into_engine(LayoutFreeReader(folder), made["optimizer_step"], made["loss_scale"], config, engine, groups)
    seen: dict[str, Any] = {"tp_rank": groups.tp_rank, "settings_kept": _settings(engine) == settings}
    seen["state"], seen["model"] = _state(engine), _model(engine)
    seen["steps"] = [float(state["step"]) for state in engine.optimizer.state.values()]
    tensors = {id(state["step"]) for state in engine.optimizer.state.values()}
    seen["own_step_tensors"] = len(tensors) == len(seen["steps"])
    seen["norm"] = _step(engine, config, groups)
    seen["steps_after"] = [float(state["step"]) for state in engine.optimizer.state.values()]
    return seen


def look_at_state(info: RankInfo, config: Config, reader: ShardReader, step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Load what ``reader`` reads into an engine; return the state as DeepSpeed's own getters see it."""
    groups = start_processes(config, info)
    engine = build_runtime(config, groups).engine
    load_into_engine(reader, step, None, config, engine, groups)
    return _state(engine)


def begin_and_look(info: RankInfo, cases: Sequence[tuple[Config, Path, str]]) -> list[dict[str, Any]]:
    """Load the weights alone into one engine after another, at data-parallel sizes; each as ``load_and_look`` does.

    cases: of each engine its configuration, the checkpoint, and which weights of it.
    """
    groups, found = start_processes(cases[0][0], info), []
    for config, folder, wanted in cases:
        engine = build_runtime(config, groups).engine
        load_weights(folder, wanted, config, engine, groups)
        steps = [float(state["step"]) for state in engine.optimizer.state.values()]
        found.append({"state": _state(engine), "model": _model(engine), "steps": steps})
        found[-1]["norm"] = _step(engine, config, groups)
    return found


def _step(engine: Any, config: Config, groups: ParallelGroups) -> float:
    count = config.num_micro_batches(groups.world_size)
    batches = [random_batch(config, seed=groups.dp_rank * count + index) for index in range(count)]
    return train_step(engine, batches, 1e-3, config.optim.clip_grad, groups).grad_norm


def _settings(engine: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]


def _state(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        moments = {m: {n: optimizer.state[p][m].clone() for n, p in engine.module.named_parameters()} for m in MOMENTS}
        return {WEIGHTS: {n: p.data.clone() for n, p in engine.module.named_parameters()}, **moments}
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()  # as in DeepSpeed's first step
    named = list(engine.module.named_parameters())
    moments = {m: {n: safe_get_full_optimizer_state(p, m).clone() for n, p in named} for m in MOMENTS}
    return {WEIGHTS: {n: safe_get_full_fp32_param(p).clone() for n, p in named}, **moments}


def _model(engine: Any) -> dict[str, torch.Tensor]:
    """The weights that the model computes with."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            found[name] = parameter.data.clone()
    return found


def load_and_save(info: RankInfo, config: Config, folder: Path, root: Path) -> str | None:
    """Load ``folder``, save under ``root`` without a step; returns the line about another layout."""
    groups = start_processes(config, info)
    engine = build_runtime(config, groups).engine
    saved = read_json(folder / STATE_FILE)
    average = EmaHook(engine, config.train.ema_decay, groups).average if config.train.ema_decay else None
    note = load_checkpoint(folder, saved, config, engine, groups, average)
    state = {"trainer": saved["trainer"], "hooks": saved["hooks"]}
    elsewhere = config.checkpoint.model_copy(update={"save": str(root)})
    saver = Saver(config.model_copy(update={"checkpoint": elsewhere}), engine, groups, average=average)
    saver.start(saved["trainer"]["step"], state)
    saver.poll(wait=True)
    return note
