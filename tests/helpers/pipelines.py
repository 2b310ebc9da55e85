"""Small trajectories that pass all phases of growth, the layouts in which they are repeated, and what may differ."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trajectory_parts import run as rp

from megatron_sgt.engine.build import start_processes
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.ranks import run_on_ranks
from tests.helpers.reference_sgt import Settings
from tests.helpers.trajectories import make_trajectory, write_trajectory
from tests.helpers.trajectory_runs import structure

MINI: Settings = {
    "name": "mini",
    "model": {
        "num_layers": 8, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48,
        "vocab_size": 64, "seq_length": 16, "norm_eps": 1e-6, "rope_theta": 10000,
    },
    "growth": {
        "first_selection_step": 2, "window_size": 2, "top_k_layers": 3, "max_selected_layers": 3, "max_loop_depth": 2,
        "num_keep_heads": 2, "decay_type": "cosine", "ema_decay": 0.5, "exclude_layers": [0, 2, 5, 7],
    },
    "optim": {
        "lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip": 0.5, "schedule": "constant",
    },
    "steps": 16,
    "global_batch": 16,
    "micro_batch": 2,
}  # fmt: skip
"""Two steps without loops, then a decision every second step: three layers, each looped twice, then fixed."""

VARIANTS: dict[str, dict[str, Any]] = {
    "sgt": {},
    "tied": {"model": {"untie_embeddings_and_output_weights": False}},
    "yarn": {"model": {"rotary_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}}},
    "olmo2": {
        "model": {"norm_position": "output", "qk_layernorm": True, "qk_layernorm_over": "all"},
        "optim": {"lr": 1e-5},  # norms of outputs make 5e-5 of a norm out of the noise of fp32 at 1e-3
    },
    "all heads": {"growth": {"head_choice": "all"}},
    "block loop": {"growth": {"method": "block_loop", "block_loop_layers": [3, 6], "block_loop_count": 1}},
}
"""What each changes in ``MINI``."""

SEEDS = {"block loop": 6}
"""With 5 fp32 is 2e-5 of a norm away from itself, summed in another order."""

LIMITS = {
    "loss": 1e-6,
    "grad_norm": 1e-5,
    "ema_entropy": 5e-6,
    "head_decay": 0.0,
    "final weights": 1e-4,
    "probe_logits": 1e-4,
}
"""Largest differences, of a norm relative to it: noise of fp32. (AdamW turns the noise of a gradient near zero into a
part of the learning rate, 1e-3.)"""


@dataclass(frozen=True)
class Case:
    """One layout of the mini trajectory. ``micro_batches``: of a step, per data-parallel rank."""

    pp: int = 2
    vp: int = 1
    dp: int = 1
    tp: int = 1
    zero: int = 1
    micro_batches: int = 4
    layout: str = "auto"
    recompute: str = "none"
    variant: str = "sgt"
    loop: str = "auto"
    sequence: bool = False
    precision: str = "fp32"
    replay: str | None = None

    @property
    def ranks(self) -> int:
        return self.pp * self.dp * self.tp

    def __str__(self) -> str:
        sizes = ((getattr(self, name), name.upper()) for name in ("pp", "vp", "tp", "dp"))
        words = ["x".join(f"{name}{size}" for size, name in sizes if size > 1) or "one rank"]
        words += [f"SP {self.loop}" if self.sequence else f"{self.loop}"] * (self.tp > 1)
        words += [f"Z{self.zero}", f"{self.micro_batches} micro-batches"]
        words += [self.layout] * (self.layout != "auto") + [f"recompute {self.recompute}"] * (self.recompute != "none")
        words += [self.variant] * (self.variant != "sgt") + [self.precision] * (self.precision != "fp32")
        return ", ".join([*words, *["replay"] * (self.replay is not None)])

    def _buckets(self) -> dict[str, Any]:
        """Several per rank; interleaved, DeepSpeed cannot reduce them while it computes."""
        if self.zero == 0:
            return {}
        return {"reduce_bucket_size": 20_000, "overlap_comm": self.vp == 1}

    def overrides(self) -> dict[str, dict[str, Any]]:
        """By section, for ``trajectory_config``."""
        return {
            "parallel": {
                "device": "cpu",
                "pipeline_model_parallel_size": self.pp,
                "virtual_pipeline_model_parallel_size": self.vp,
                "pipeline_model_parallel_layout": self.layout,
                "tensor_model_parallel_size": self.tp,
                "sequence_parallel": self.sequence,
                "loop_method": self.loop,
                "zero_stage": self.zero,
            },
            "train": {
                "micro_batch_size": MINI["global_batch"] // self.dp // self.micro_batches,
                "recompute_granularity": self.recompute,
                "precision": self.precision,
                "threads_per_rank": 1,
            },
            "deepspeed": {"zero_optimization": self._buckets()},
        }


def settings_of(variant: str) -> Settings:
    """MINI with the changes of a variant."""
    settings = deepcopy(MINI)
    for section, values in VARIANTS[variant].items():
        settings[section].update(values)
    return settings


def write_mini(path: Path, variant: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Write the trajectory that the reference makes of a variant; (tensors, metadata)."""
    made = make_trajectory(settings_of(variant), SEEDS.get(variant, 5))
    write_trajectory(path, *made)
    return made


def repeat_on(info: RankInfo, path: Path, case: Case, **train: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Repeat the trajectory ``path`` as ``case`` and ``train`` say; every rank's own view of it."""
    tensors, meta = rp.read_trajectory(path)
    overrides = case.overrides()
    overrides["train"].update(train)
    if case.replay is not None:
        overrides["growth"] = {**meta["growth"], "replay": case.replay}
    config = rp.trajectory_config(tensors, meta, overrides)
    groups = start_processes(config, info)
    return rp.repeat(config, groups, rp.inputs_of(tensors), meta)


def run_case(path: Path, case: Case, function: Any = repeat_on, *args: Any) -> Any:
    """``function(info, path, case, *args)`` on the ranks of ``case``, over gloo: its messages can be mixed up."""
    return run_on_ranks(case.ranks, function, path, case, *args, timeout=300, backend="gloo")


def gaps(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference per quantity of ``LIMITS``, of norms relative; infinite where shapes or names differ."""

    def worst(name: str) -> float:
        if name not in found or found[name].shape != wanted[name].shape:
            return float("inf")
        gap = (found[name].double() - wanted[name].double()).abs()
        if name == "grad_norm":
            gap = gap / wanted[name].double()
        return float(gap.max().nan_to_num(nan=float("inf")))

    weights = [name for name in wanted if name.startswith("final/")]
    extra = {name for name in found if name.startswith("final/")} - {*weights}
    named = {name: worst(name) for name in LIMITS if name != "final weights"}
    return {**named, "final weights": float("inf") if extra else max(map(worst, weights))}


def beyond(measured: dict[str, float], limits: dict[str, float] | None = None) -> dict[str, float]:
    """What is larger than its limit."""
    return {name: gap for name, gap in measured.items() if not gap <= (limits or LIMITS)[name]}


def check_same(by_rank: list[Any], wanted: dict[str, Tensor], wanted_meta: dict[str, Any]) -> dict[str, float]:
    """Every rank saw the same, all events and depths are those of ``wanted``; the differences in numbers."""
    found, meta = by_rank[0]
    for other, other_meta in by_rank[1:]:
        for name in ("loss", "grad_norm", "ema_entropy", "loop_depth", "probe_logits"):
            assert torch.equal(found[name], other[name]), f"{name} differs between ranks"
        assert other_meta["events"] == meta["events"]
    assert structure(meta) == structure(wanted_meta)
    assert torch.equal(found["loop_depth"].long(), wanted["loop_depth"].long())
    return gaps(found, wanted)
