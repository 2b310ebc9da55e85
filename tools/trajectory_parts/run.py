"""Repeats a recorded trajectory through the project's own model, engine, optimizer and schedule.

A trajectory file (safetensors) holds settings, initial weights under Hugging Face names and the tokens of
every step; the run writes what this implementation makes of them, under the same keys, so that any two
implementations or layouts can be compared step by step. Format: tests/golden/README.md.
"""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_sgt.config import Config, parse_config
from megatron_sgt.data.document_samples import DOCUMENT_KEYS
from megatron_sgt.engine.build import Runtime, build_runtime
from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.hooks.growth import GrowthHook
from megatron_sgt.engine.loop import Trainer
from megatron_sgt.engine.step import Batch, StepResult, TrainState
from megatron_sgt.errors import DataError
from megatron_sgt.growth import GrowthEvent, Schedule, SGTSchedule, build_schedule
from megatron_sgt.guard.stop import StopRequests
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.model.hf_weights import hf_weights
from megatron_sgt.parallel.collectives import mean_over_data_parallel
from megatron_sgt.parallel.groups import ParallelGroups

Tensors = dict[str, Tensor]

TOLERANCES = {
    "loss": 3e-5,
    "ema_entropy": 3e-5,
    "head_decay": 1e-5,
    "final weights": 5e-4,
    "probe_logits": 1e-3,
}
"""Largest absolute differences from the authors' fp32 run that a faithful implementation shows."""


def read_trajectory(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and metadata of a trajectory file.

    Raises:
        DataError: the file is none.
    """
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["meta"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a trajectory file: {error}") from error


def write_trajectory(path: Path, tensors: Tensors, meta: dict[str, Any]) -> None:
    """Write a trajectory file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"meta": json.dumps(meta)})


def trajectory_config(tensors: Tensors, meta: dict[str, Any], overrides: dict[str, dict[str, Any]]) -> Config:
    """The configuration that a trajectory's metadata describes.

    Head size, query groups, norms and tied embeddings are read off the shapes of the initial weights.

    Args:
        overrides: values per section (parallel layout, recompute, ...) on top.
    """
    model, optim = meta["model"], meta["optim"]
    if optim.get("schedule", "constant") != "constant":
        raise DataError(f"the trajectory's learning-rate schedule {optim['schedule']!r} is not supported: constant is")
    first = "init/model.layers.0.self_attn."
    try:
        head_size = tensors[f"{first}q_proj.weight"].shape[0] // model["num_attention_heads"]
        kv_rows = tensors[f"{first}k_proj.weight"].shape[0]
    except KeyError as error:
        raise DataError(f"the trajectory lacks the initial weight {error}") from error
    query_norm = tensors.get(f"{first}q_norm.weight")
    outputs = "init/model.layers.0.post_feedforward_layernorm.weight" in tensors
    sections: dict[str, dict[str, Any]] = {
        "model": {
            **{name: model[name] for name in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")},
            "ffn_hidden_size": model["ffn_hidden_size"],
            "seq_length": model["seq_length"],
            "layernorm_epsilon": model["norm_eps"],
            "rotary_base": model["rope_theta"],
            "rotary_scaling": model.get("rotary_scaling"),
            "kv_channels": head_size,
            "num_query_groups": kv_rows // head_size,
            "norm_position": "output" if outputs else "input",
            "qk_layernorm": query_norm is not None,
            "qk_layernorm_over": "head" if query_norm is None or len(query_norm) == head_size else "all",
            "untie_embeddings_and_output_weights": "init/lm_head.weight" in tensors,
            # Unpadded, as the recorded softmax is over the real vocabulary alone.
            "make_vocab_size_divisible_by": model["vocab_size"],
        },
        "growth": _growth(meta),
        "optim": {
            "lr": optim["lr"],
            "adam_beta1": optim["betas"][0],
            "adam_beta2": optim["betas"][1],
            "adam_eps": optim["eps"],
            "weight_decay": optim["weight_decay"],
            "clip_grad": optim["clip"],
            "lr_decay_style": "constant",
        },
        "train": {
            "train_iters": meta["steps"],
            "global_batch_size": meta["global_batch"],
            "micro_batch_size": meta["micro_batch"],
            "precision": "fp32",
        },
        "parallel": {},
        "data": dict(meta.get("data", {})),
    }
    for section, values in overrides.items():
        sections[section] = {**sections.get(section, {}), **values}
    return parse_config(sections, "the trajectory's metadata")


def _growth(meta: dict[str, Any]) -> dict[str, Any]:
    """The trajectory's growth section; more top layers than selectable ones means all of them."""
    growth = dict(meta["growth"])
    selectable = meta["model"]["num_layers"] - len(growth.get("exclude_layers", [0]))
    if "top_k_layers" in growth:
        growth["top_k_layers"] = min(growth["top_k_layers"], selectable)
    return growth


class _Recorder(Hook):
    """Keeps what the golden file keeps, after every applied step."""

    name = "recorder"

    def __init__(self, schedule: Schedule, groups: ParallelGroups) -> None:
        self.schedule = schedule
        self.groups = groups
        self.rows: dict[str, list[Tensor]] = {
            name: [] for name in ("loss", "grad_norm", "ema_entropy", "head_decay", "loop_depth")
        }

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Record one step; the growth hook has acted already."""
        loss = mean_over_data_parallel(result.loss.double().clone(), self.groups)
        values = {
            "loss": loss.cpu(),
            "grad_norm": torch.tensor(result.grad_norm, dtype=torch.float64),
            "ema_entropy": torch.from_numpy(self._ema()).float(),
            "head_decay": torch.from_numpy(self.schedule.plan.gates(self.schedule.num_heads)).float(),
            "loop_depth": torch.tensor(self.schedule.plan.loops),
        }
        for name, value in values.items():
            self.rows[name].append(value)

    def _ema(self) -> NDArray[np.float64]:
        if isinstance(self.schedule, SGTSchedule):
            return self.schedule.ema
        return np.zeros((self.schedule.num_layers, self.schedule.num_heads))  # baselines measure nothing

    def tensors(self) -> Tensors:
        """One tensor per key, the step as first dimension."""
        return {name: torch.stack(rows) for name, rows in self.rows.items()}


def repeat(config: Config, groups: ParallelGroups, source: Tensors, meta: dict[str, Any]) -> tuple[Tensors, dict]:
    """Train on the trajectory's tokens and return what was seen, under the golden file's keys; collective.

    Every rank returns the same tensors.
    """
    initial = {name.removeprefix("init/"): t for name, t in source.items() if name.startswith("init/")}
    runtime = build_runtime(config, groups, weights=initial)
    schedule = build_schedule(config.growth, config.model.num_layers, config.model.num_attention_heads)
    events: list[GrowthEvent] = []
    growth = GrowthHook(schedule, runtime.model, runtime.model.meter, groups, events.append)
    recorder = _Recorder(schedule, groups)
    trainer = Trainer(config, groups, runtime.engine, TrainState(), [growth, recorder], StopRequests(config.train))
    trainer.run(_micro_batches(source, config, groups), config.train.train_iters)
    result = recorder.tensors()
    result |= {f"final/{name}": weight for name, weight in gather_hf_weights(runtime, config).items()}
    runtime.engine.eval()
    apply_plan(runtime.model, schedule.plan.inference())
    probe = source["probe_tokens"].long().to(groups.device)
    with whole_weights(runtime):
        logits = runtime.model.logits(probe)[..., : config.model.vocab_size]
    result |= {**inputs_of(source), "probe_logits": logits.float().cpu()}
    return result, {**meta, "events": [event.to_dict() for event in events]}


def whole_weights(runtime: Runtime) -> AbstractContextManager[None]:
    """Context in which every rank holds its weights whole, also where ZeRO-3 has spread them."""
    sharded = runtime.engine.zero_optimization_stage() == 3
    return deepspeed.zero.GatheredParameters(list(runtime.model.parameters()), enabled=sharded)


def gather_hf_weights(runtime: Runtime, config: Config) -> Tensors:
    """The model's weights under Hugging Face names on every rank; collective. For small models."""
    with whole_weights(runtime):
        local = {name: t.detach().float().cpu() for name, t in runtime.model.gpt.state_dict().items()}
    groups = runtime.groups
    stages: list[Any] = [local]
    if groups.pp_size > 1:
        stages = [None] * groups.pp_size
        dist.all_gather_object(stages, local, group=groups.pp_group)
    shards: list[Any] = [None] * groups.tp_size
    dist.all_gather_object(shards, dict(ChainMap(*stages)), group=groups.tp_group)
    return hf_weights(shards, config.model)


def inputs_of(tensors: Tensors) -> Tensors:
    """What a trajectory begins with: initial weights, tokens and, where there are any, their documents."""
    names = ("tokens", "probe_tokens", *DOCUMENT_KEYS)
    return {name: t for name, t in tensors.items() if name.startswith("init/") or name in names}


def _micro_batches(source: Tensors, config: Config, groups: ParallelGroups) -> Iterator[Batch]:
    """This rank's micro-batches of every step, of tokens [steps, sequences, S]; the last position has no label."""
    size = config.train.micro_batch_size
    count = config.num_micro_batches(groups.world_size)
    documents = {name: source[name].int() for name in DOCUMENT_KEYS if name in source}
    for number, step in enumerate(source["tokens"].long()):
        for index in range(count):
            first = (index * groups.dp_size + groups.dp_rank) * size
            rows = step[first : first + size]
            told = {name: t[number, first : first + size] for name, t in documents.items()}
            positions = torch.arange(rows.shape[1]).expand_as(rows)
            labels = torch.roll(rows, -1, dims=1)
            batch = {"tokens": rows, "labels": labels, "position_ids": positions}
            batch["loss_mask"] = _loss_mask(positions, told, config)
            yield {**batch, **told} if config.data.tells_documents else batch


def _loss_mask(places: Tensor, documents: Tensors, config: Config) -> Tensor:
    """1 where a label counts: one of the same sequence, before its padding, with eod_mask_loss of the same document."""
    mask = torch.ones(places.shape)
    mask[:, -1] = 0.0
    if documents:
        mask *= places + 1 < documents["num_tokens"][:, None]
    if documents and config.data.eod_mask_loss:
        mask *= documents["document_starts"].roll(-1, 1) == documents["document_starts"]
    return mask


def compare(result: Tensors, meta: dict, golden: Tensors, golden_meta: dict) -> tuple[dict[str, float], list[str]]:
    """Largest absolute differences per quantity, and what is beyond ``TOLERANCES`` or differs in events."""
    shared = [name for name in golden if name.startswith("final/")]
    differences = {
        name: float((result[name].double() - golden[name].double()).abs().max())
        for name in ("loss", "grad_norm", "ema_entropy", "head_decay", "probe_logits")
    }
    gaps = [(result[n].double() - golden[n].double()).abs().max() for n in shared]
    differences["final weights"] = float(torch.stack(gaps).max())  # unlike Python's max it passes NaN on
    problems = [
        f"{name} differs by {differences[name]:.2e}, tolerance {limit:.0e}"
        for name, limit in TOLERANCES.items()
        if not differences[name] <= limit  # also catches NaN
    ]
    if not torch.equal(result["loop_depth"].long(), golden["loop_depth"].long()):
        problems.append("loop_depth differs")
    mine, theirs = ([_structure(e) for e in m["events"]] for m in (meta, golden_meta))
    if mine != theirs:
        problems.append(f"events differ: {mine} instead of {theirs}")
    return differences, problems


def _structure(event: dict[str, Any]) -> tuple[Any, ...]:
    kept = tuple(sorted((int(k), tuple(v)) for k, v in event["kept_heads"].items()))
    return event["step"], event["layer"], event["phase"], kept
