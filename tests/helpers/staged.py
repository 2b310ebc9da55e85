"""Small runs that grow twice, one per method of growth, and what plain PyTorch makes of the same stages."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sgt.arch.weights import weights
from megatron_sgt.config import Config, parse_config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.data.gpt_dataset import build_datasets
from megatron_sgt.engine.hooks.base import Hook, RunParts
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.apply_plan import sgt_layers
from megatron_sgt.model.initial_weights import initial_value
from megatron_sgt.stages.stages import stages_of
from tests.helpers.reference_growth import Params
from tests.helpers.reference_stages import train
from tests.helpers.runs import reported, tiny_config

FIRST, SECOND, LAST = 3, 6, 9
"""Steps after which the model grows, and the end."""
MODEL: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 6,
    "ffn_hidden_size": 20, "seq_length": 12, "vocab_size": 64, "make_vocab_size_divisible_by": 16,
    "init_method_std": 0.2, "layernorm_epsilon": 1e-4,
}  # fmt: skip
OPTIM: dict[str, Any] = {"lr": 3e-3, "min_lr": 3e-4, "lr_warmup_iters": 2}
SECTIONS: dict[str, dict[str, Any]] = {
    "model": MODEL,
    "growth": {"method": "vanilla"},
    "optim": OPTIM,
    "parallel": {"device": "cpu"},
    "train": {"train_iters": LAST, "micro_batch_size": 1, "global_batch_size": 4, "eval_interval": 0},
    "data": {"split": "1,0,0"},
    "logging": {"log_interval": 1, "progress_bar": "off"},
}
Growth = tuple[dict[str, Any], str, str, str]
"""Options, what becomes of the moments, of AdamW's step, of the learning rate."""


def stages(operator: str, *growths: Growth, weights: str = "weights") -> list[dict[str, Any]]:
    """Values of ``growth.stages``, none left to a default."""
    return [
        {
            "until_steps": end, "operator": operator, "options": options, "moments": moments, "optimizer": optimizer,
            "lr_policy": rate, "weights": weights,
        }
        for end, (options, moments, optimizer, rate) in zip((FIRST, SECOND), growths, strict=True)
    ]  # fmt: skip


METHODS: dict[str, list[dict[str, Any]]] = {
    "g_stack": stages(
        "g_stack", ({"factor": 2}, "fresh", "fresh", "rewarm(2)"), ({"factor": 2}, "copy", "continue", "continue")
    ),
    "grad_stack": stages(
        "grad_stack",
        ({"block_size": 1}, "copy", "continue", "rewind(1)"),
        ({"block_size": 1}, "copy", "rewind(4)", "rewarm(2)"),
    ),
    "midas": stages(
        "midas",
        ({"block_size": 1}, "copy", "continue", "continue"),
        ({"block_size": 1}, "fresh", "fresh", "rewind(2)"),
    ),
    "lidas": stages(
        "lidas",
        ({"block_size": 2}, "copy", "continue", "continue"),
        ({"block_size": 2}, "copy", "rewind(3)", "rewind(4)"),
    ),
    "msg_ffn": stages(
        "msg",
        ({"ffn_hidden_size": 28}, "scaled", "continue", "continue"),
        ({"ffn_hidden_size": 38}, "seeded", "continue", "rewind(2)"),
    ),
    "msg_hidden": stages(
        "msg",
        ({"hidden_size": 32}, "scaled", "rewind(2)", "continue"),
        ({"hidden_size": 40}, "seeded", "continue", "rewarm(3)"),
    ),
    "msg_heads": stages(
        "msg",
        ({"num_attention_heads": 8}, "scaled", "continue", "rewind(2)"),
        ({"num_attention_heads": 12}, "copy", "rewind(3)", "rewind(2)"),
    ),
    "msg_layers": stages(
        "msg",
        ({"num_layers": 3}, "scaled", "continue", "continue"),
        ({"num_layers": 5}, "seeded", "rewind(2)", "rewarm(2)"),
    ),
    "msg_all": stages(
        "msg",
        ({"num_layers": 3, "hidden_size": 28, "ffn_hidden_size": 24}, "scaled", "rewind(1)", "rewind(2)"),
        ({"num_layers": 4, "hidden_size": 32, "num_attention_heads": 8}, "scaled", "continue", "rewarm(2)"),
    ),
    "msg_ramp": stages(
        "msg",
        ({"ffn_hidden_size": 28, "num_layers": 3, "ramp_steps": 3}, "scaled", "continue", "continue"),
        ({"num_layers": 5, "ramp_steps": 2}, "scaled", "rewind(2)", "rewarm(2)"),
    ),
    "compound_grow": stages(
        "compound_grow",
        ({"factor": 2, "noise": 0.0}, "scaled", "continue", "continue"),
        ({"factor": 3, "noise": 0.0}, "copy", "continue", "rewind(3)"),
    ),
    "compound_grow_noise": stages(
        "compound_grow",
        ({"factor": 2, "noise": 0.1}, "fresh", "fresh", "rewarm(2)"),
        ({"factor": 2, "noise": 0.3}, "scaled", "rewind(2)", "continue"),
    ),
    "auto_prog": stages(
        "auto_prog",
        ({"num_layers": 3}, "fresh", "fresh", "rewarm(2)"),
        ({"num_layers": 5}, "copy", "continue", "rewarm(3)"),
    ),
    "auto_prog_ema": stages(
        "auto_prog",
        ({"num_layers": 3}, "fresh", "fresh", "rewarm(2)"),
        ({"num_layers": 5}, "fresh", "fresh", "rewarm(2)"),
        weights="ema",
    ),
}
"""Stages that end at FIRST and SECOND."""
EMA_DECAY = 0.7


def ema_decay_of(method: str) -> float:
    return EMA_DECAY if method.endswith("_ema") else 0.0


def model_of(method: str) -> dict[str, Any]:
    return MODEL | ({"qk_layernorm": True} if method == "msg_all" else {})


def staged_config(run_dir: Path, data: str, method: str, /, **sections: dict[str, Any]) -> Config:
    """A run of three stages on ``data``, writing to ``run_dir``, with the given values per section on top."""
    ours: dict[str, dict[str, Any]] = {
        "model": model_of(method),
        "data": {"data_path": [data], "data_cache_path": f"{data}_cache"},
        "logging": {"run_dir": str(run_dir)},
        "growth": {"stages": METHODS[method]},
        "train": {"ema_decay": ema_decay_of(method)},
    }
    names = {*SECTIONS, *ours, *sections}
    return parse_config(
        {name: {**SECTIONS.get(name, {}), **ours.get(name, {}), **sections.get(name, {})} for name in names}
    )


@cache
def by_reference(data: str, method: str) -> list[tuple[float, float, float]]:
    """(loss, norm of the gradient, learning rate) of every step, by plain PyTorch in fp64."""
    config = staged_config(Path("unused"), data, method)
    models = [stage.config.model for stage in stages_of(config)]
    seed = config.train.seed

    def draw(number: int) -> Params:
        return initial(models[number], seed, number)

    return train(draw(0), model_of(method), METHODS[method], OPTIM, samples(config), draw, seed, ema_decay_of(method))


def initial(model: ModelConfig, seed: int, stage: int) -> Params:
    """The initial values of all tensors, whole."""
    cpu = torch.device("cpu")
    return {n: initial_value(w, n, model, seed, cpu, stage) for w in weights(model) for n in w.whole}


def samples(config: Config) -> tuple[Tensor, Tensor]:
    """Tokens and labels [steps, sequences, T] of the run, in its order."""
    data, count = build_datasets(config, None)[0], config.train.global_batch_size
    found = [data[index] for index in range(config.train.train_iters * count)]
    assert all(bool(sample["loss_mask"].all()) for sample in found)
    tokens, labels = (torch.stack([sample[name] for sample in found]) for name in ("tokens", "labels"))
    return tokens.view(-1, count, tokens.shape[1]), labels.view(-1, count, labels.shape[1])


INSIDE, DECIDES, END = 4, 9, 12
"""Steps after which a looping run grows, inside a window and with a decision, and its end."""
LOOPING: list[dict[str, Any]] = [
    {"until_steps": INSIDE, "operator": "midas", "options": {"block_size": 1}, "lr_policy": "rewarm(3)"},
    {
        "until_steps": DECIDES, "operator": "msg", "optimizer": "rewind(5)",
        "options": {"hidden_size": 40, "ffn_hidden_size": 56, "num_attention_heads": 6, "num_layers": 7},
    },
]  # fmt: skip


class Counting(Hook):
    """A hook of a user's own, which says in its state what it has been attached to and what it has seen."""

    name = "counting"

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.norms = 0.0

    def attach(self, parts: RunParts) -> None:
        self.parts = parts

    def after_step(self, state: TrainState, result: StepResult) -> None:
        assert self.parts.engine.module is self.parts.model
        assert self.parts.schedule.num_layers == self.parts.config.model.num_layers == len(sgt_layers(self.parts.model))
        self.layers.append(self.parts.config.model.num_layers)
        self.norms += result.grad_norm

    def state_dict(self) -> dict[str, Any]:
        return {"layers": self.layers, "norms": self.norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.layers, self.norms = list(state["layers"]), float(state["norms"])


def looping_config(run_dir: Path, data: str, /, **sections: dict[str, Any]) -> Config:
    """A run with loops that grow, dropout and an average of its weights, in three stages."""
    ours: dict[str, dict[str, Any]] = {
        "model": {"kv_channels": 8, "hidden_dropout": 0.1, "attention_dropout": 0.1},
        "growth": {"stages": LOOPING},
        "train": {"train_iters": END, "eval_interval": 0, "ema_decay": EMA_DECAY},
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    }
    return tiny_config(
        run_dir, data, **{name: {**ours.get(name, {}), **sections.get(name, {})} for name in {*ours, *sections}}
    )


def pretrain_counting(info: RankInfo, config: Config) -> None:
    """Train to the end with a hook of one's own; for ``run_on_ranks``."""
    PretrainingRun(config, info, hooks=[Counting()]).train()


def grow_records(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Step -> how the model grew there, without what only the process that has seen both models can say."""
    records = {record["step"]: record for record in reported(run_dir, "grow")}
    return {step: {k: v for k, v in record.items() if k != "probe_loss_before"} for step, record in records.items()}
