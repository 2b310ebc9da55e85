"""What the ranks of a run say about their model right after training it; for ``run_on_ranks``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from trajectory_parts.run import whole_weights

from megatron_sgt.config import Config
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.apply_plan import apply_plan, begin_step
from megatron_sgt.model.gpt import LanguageModel

MULTIPLE = 4
"""Lengths are padded to a multiple of this at the right, where causal attention does not look: ranks share tokens."""


@dataclass(frozen=True)
class Told:
    """In inference mode: logits [B, S, vocabulary] of the probe, its loss, and the greedy continuation of prompts."""

    logits: Tensor
    loss: float
    greedy: Tensor
    loop_depth: list[int]


def train_and_tell(info: RankInfo, config: Config, probe: Tensor, prompts: Tensor, new_tokens: int) -> Told | None:
    """Train to the end (which saves a checkpoint), then ask the ranks' own model; rank 0 returns."""
    run = PretrainingRun(config, info)
    run.train()
    run.runtime.engine.eval()
    model = run.runtime.model
    apply_plan(model, run.schedule.plan.inference())
    with whole_weights(run.runtime), torch.no_grad():
        logits = _logits(model, probe)
        loss = _loss(model, probe)
        text = prompts
        for _ in range(new_tokens):
            text = torch.cat([text, _logits(model, text)[:, -1:].argmax(-1)], dim=1)
    if not run.groups.is_main:
        return None
    return Told(logits, loss, text[:, prompts.shape[1] :], list(run.schedule.plan.loops))


def _logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    return model.logits(pad(tokens, (0, -tokens.shape[1] % MULTIPLE)))[:, : tokens.shape[1]]


def _loss(model: LanguageModel, tokens: Tensor) -> float:
    """The training forward's loss."""
    mask = torch.ones(tokens.shape)
    mask[:, -1] = 0.0
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    begin_step(model)
    return float(model(tokens, torch.roll(tokens, -1, dims=1), mask, positions))
