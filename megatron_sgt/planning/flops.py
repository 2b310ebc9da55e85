"""Floating-point operations of a training step, in closed form, for any LoopPlan. Never runs the model.

Conventions, which are those of ``torch.utils.flop_counter``: a product [m, k] x [k, n] counts 2mkn; only
matrix products and attention count; causal attention counts as if it were full. Then, for tokens B·S,

    linear (forward)     2 · B·S · (weights that the tokens are multiplied with)
    attention (forward)  4 · B · N · S² · H          (scores, and probabilities times values)
    entropy (forward)    2 · B · N · S · H           (one row of scores)
    backward             2 · linear  +  2.5 · attention   (flash attention computes the scores again)

Model FLOPs, the numerator of MFU, count 3 · forward of linear and attention (PaLM, arXiv 2204.02311,
appendix B): recomputed scores and the entropy are overhead, loop passes are part of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.growth import LayerPlan, LoopPlan


@dataclass(frozen=True)
class Flops:
    """Forward operations by kind, and what follows for a training step. Unit: operations."""

    linear: int = 0
    attention: int = 0
    entropy: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.linear + other.linear, self.attention + other.attention, self.entropy + other.entropy
        )

    @property
    def forward(self) -> int:
        """All operations of the forward pass."""
        return self.linear + self.attention + self.entropy

    @property
    def backward(self) -> int:
        """All operations of the backward pass, recomputed scores included."""
        return 2 * self.linear + 5 * self.attention // 2

    @property
    def executed(self) -> int:
        """Forward and backward as the device executes and torch's counter counts them."""
        return self.forward + self.backward

    @property
    def model(self) -> int:
        """Model FLOPs of a training step: 3 · (linear + attention)."""
        return 3 * (self.linear + self.attention)


def step_flops(
    model: ModelConfig, plan: LoopPlan, sequences: int, entropy: bool = False, vocab_rows: int | None = None
) -> Flops:
    """FLOPs of one training step of the whole model, summed over tensor-parallel ranks.

    Args:
        plan: the structure that is executed; the empty plan is vanilla.
        sequences: sequences of ``model.seq_length`` tokens in the step.
        entropy: whether attention entropies are being collected.
        vocab_rows: rows of the output projection (default: the padded vocabulary).
    """
    rows = model.padded_vocab_size() if vocab_rows is None else vocab_rows
    total = Flops(linear=2 * sequences * model.seq_length * model.hidden_size * rows)
    for layer in plan:
        total += _layer_flops(model, layer, sequences, entropy)
    return total


@dataclass(frozen=True)
class PassFlops:
    """One execution of a layer's two halves."""

    attention: Flops
    mlp: Flops


def pass_flops(model: ModelConfig, sequences: int, entropy: bool = False) -> PassFlops:
    """FLOPs of one execution of an ordinary layer on ``sequences`` sequences, all tensor-parallel ranks."""
    tokens = sequences * model.seq_length
    mlp_matrices = 3 if model.activation == "swiglu" else 2
    return PassFlops(
        _attention_pass(model, model.num_attention_heads, model.num_query_groups, sequences, entropy),
        Flops(linear=2 * tokens * model.hidden_size * model.ffn_hidden_size * mlp_matrices),
    )


def _layer_flops(model: ModelConfig, plan: LayerPlan, sequences: int, entropy: bool) -> Flops:
    once = pass_flops(model, sequences, entropy)
    total = Flops()
    for _ in range(1 + plan.block_loops):
        total += once.attention + once.mlp
    if plan.loops == 0:
        return total
    one_pass = once.attention
    if plan.phase == "sparse":
        layout = HeadLayout(model.num_attention_heads, model.num_query_groups, model.kv_channels)
        kept = layout.local(plan.kept_heads)
        one_pass = _attention_pass(model, len(kept.heads), len(kept.groups), sequences, entropy)
    for _ in range(plan.loops):
        total += one_pass
    return total


def _attention_pass(model: ModelConfig, heads: int, groups: int, sequences: int, entropy: bool) -> Flops:
    """One execution of the attention with ``heads`` query heads on ``groups`` key/value groups."""
    length, size = model.seq_length, model.kv_channels
    projections = (heads + 2 * groups) * size + heads * size
    return Flops(
        linear=2 * sequences * length * model.hidden_size * projections,
        attention=4 * sequences * heads * length * length * size,
        entropy=2 * sequences * heads * length * size if entropy else 0,
    )


def overhead(model: ModelConfig, plan: LoopPlan) -> float:
    """Model FLOPs of ``plan`` over those of vanilla, minus 1."""
    vanilla = step_flops(model, LoopPlan.empty(model.num_layers), 1)
    return step_flops(model, plan, 1).model / vanilla.model - 1.0
