"""Floating-point operations of a training step, in closed form, for any LoopPlan. Never runs the model.

The operations of a layer's parts, and what is counted, are those of ``arch.attention``, ``arch.ffn`` and
``arch.flops``: for tokens B·S,

    linear (forward)     2 · B·S · (weights that the tokens are multiplied with)
    attention (forward)  4 · B · N · S² · H          (scores, and probabilities times values)
    entropy (forward)    2 · B · N · S · H           (one row of scores)

Where no token attends to another document, the sum of the squares of the documents' lengths takes the place of S², a
mean over the sequences (``AttendedPairs``).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sgt.arch.attended_pairs import AttendedPairs
from megatron_sgt.arch.attention import CAUSAL
from megatron_sgt.arch.ffn import ffn_kind
from megatron_sgt.arch.flops import Flops
from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.planning.phases import parts_within


def step_flops(
    model: ModelConfig,
    plan: LoopPlan,
    sequences: int,
    entropy: bool = False,
    vocab_rows: int | None = None,
    pairs: AttendedPairs | None = None,
) -> Flops:
    """FLOPs of one training step of the whole model, summed over tensor-parallel ranks.

    Args:
        plan: the structure that is executed; the empty plan is vanilla.
        sequences: sequences of ``model.seq_length`` tokens in the step.
        entropy: whether attention entropies are being collected.
        vocab_rows: rows of the output projection (default: the padded vocabulary).
        pairs: of the data; None, here and below: every sequence is one document.
    """
    rows = model.padded_vocab_size() if vocab_rows is None else vocab_rows
    total = Flops(linear=2 * sequences * model.seq_length * model.hidden_size * rows)
    for index, layer in enumerate(plan):
        total += _layer_flops(model, index, layer, sequences, entropy, pairs)
    return total


def batch_flops(
    config: Config, plan: LoopPlan, seq_length: int, samples: int, pairs: AttendedPairs | None = None
) -> Flops:
    """FLOPs of one optimizer step on ``samples`` samples, cut into sequences of ``seq_length`` tokens."""
    sequences = samples * (config.model.seq_length // seq_length)
    return step_flops(at_length(config.model, seq_length), plan, sequences, pairs=pairs)


def flops_between(config: Config, plan: LoopPlan, first: int, last: int, pairs: AttendedPairs | None = None) -> int:
    """Model FLOPs of steps ``first`` to ``last`` of ``plan``, both inclusive, each at its length, batch and data."""
    return sum(
        span.steps * batch_flops(config, plan, part.seq_length, span.size, pairs and pairs.at(part.first)).model
        for part in parts_within(config, first, last)
        for span in config.batches.within(part.first, part.last)
    )


def at_length(model: ModelConfig, seq_length: int) -> ModelConfig:
    """``model`` on sequences of ``seq_length`` tokens."""
    return model.model_copy(update={"seq_length": seq_length})


@dataclass(frozen=True)
class PassFlops:
    """One execution of a layer's two halves."""

    attention: Flops
    mlp: Flops


def pass_flops(
    model: ModelConfig, layer: int, sequences: int, entropy: bool = False, pairs: AttendedPairs | None = None
) -> PassFlops:
    """FLOPs of one execution of layer ``layer`` on ``sequences`` sequences, all tensor-parallel ranks."""
    heads, groups = model.num_attention_heads, model.num_query_groups
    return PassFlops(
        CAUSAL.flops(model, layer, sequences, heads, groups, entropy, _square(model, pairs)),
        ffn_kind(model.activation).flops(model, layer, sequences * model.seq_length),
    )


def _square(model: ModelConfig, pairs: AttendedPairs | None) -> float | None:
    return None if pairs is None else pairs.square(model.seq_length)


def _layer_flops(
    model: ModelConfig, layer: int, plan: LayerPlan, sequences: int, entropy: bool, pairs: AttendedPairs | None
) -> Flops:
    once = pass_flops(model, layer, sequences, entropy, pairs)
    total = Flops()
    for _ in range(plan.executions):
        total += once.attention + once.mlp
    if plan.loops == 0:
        return total
    one_pass = once.attention
    if plan.phase == "sparse":
        heads, groups = HeadLayout.of(model).kept_counts(plan.kept_heads)
        one_pass = CAUSAL.flops(model, layer, sequences, heads, groups, entropy, _square(model, pairs))
    for _ in range(plan.loops):
        total += one_pass
    return total


def overhead(model: ModelConfig, plan: LoopPlan, pairs: AttendedPairs | None = None) -> float:
    """Model FLOPs of ``plan`` over those of vanilla, minus 1."""
    vanilla = step_flops(model, LoopPlan.empty(model.num_layers), 1, pairs=pairs)
    return step_flops(model, plan, 1, pairs=pairs).model / vanilla.model - 1.0
