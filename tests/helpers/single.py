"""A single-process model for unit tests: one gloo rank in this process, started once."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_sgt.config import Config
from megatron_sgt.engine.build import start_processes
from megatron_sgt.launch.environment import discover
from megatron_sgt.model.gpt import LanguageModel, build_model
from megatron_sgt.parallel.groups import ParallelGroups

SMALL: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 96,
        "seq_length": 32,
        "vocab_size": 128,
    },
    "growth": {"num_keep_heads": 2, "max_loop_depth": 2},
    "optim": {"lr": 1e-3},
    "train": {"train_iters": 10, "micro_batch_size": 2, "global_batch_size": 2, "threads_per_rank": 1},
    "parallel": {"device": "cpu"},
}


def small_config(phases: Sequence[dict[str, Any]] = (), **sections: dict[str, Any]) -> Config:
    """SMALL with the given values per section on top."""
    merged = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *sections}}
    return Config.model_validate({**merged, "phases": tuple(phases)})


def single_groups(config: Config) -> ParallelGroups:
    """The process groups of this process alone."""
    return start_processes(config, discover({}))


def single_model(config: Config, plain: bool = False) -> LanguageModel:
    """Build ``config``'s model in this process, in fp32."""
    passes = 1 + config.growth.max_loop_depth
    return build_model(config, single_groups(config), "fp32", passes, plain)


def random_batch(config: Config, seed: int = 0) -> dict[str, torch.Tensor]:
    """One micro-batch of random tokens."""
    model, size = config.model, config.train.micro_batch_size
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocab_size or 2, (size, model.seq_length + 1), generator=generator)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(size, model.seq_length),
        "position_ids": torch.arange(model.seq_length).expand(size, -1),
    }
