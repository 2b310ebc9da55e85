"""Bytes of one micro-batch's activations on one rank, and the most that a rank holds at once.

Activations are what autograd keeps from forward to backward, listed operation by operation below for this project's
layers; what the backward pass adds on top for a moment is in ``Activations.transient``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.config import Config
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.planning.loop_cost import LoopMethod, choose_loop_method
from megatron_sgt.planning.parameters import ELEMENT_BYTES
from megatron_sgt.planning.state_memory import state_memory
from megatron_sgt.planning.traffic import kept_counts

_FP32 = 4


@dataclass(frozen=True)
class Kernels:
    """What differs between devices in what operations keep for the backward pass.

    ``norm_copies``: copies of its input's size that RMSNorm keeps beside the input (composite kernels keep the
    normalised one); ``mask_bytes``: of one element's dropout mask (None: as many as an element has); ``cuts_keys``:
    balanced loops keep keys and values as cut and copied for this rank, not as gathered; ``groups``: attention in 16
    bits reads grouped keys and values, which are repeated otherwise.
    """

    norm_copies: int
    mask_bytes: int | None
    cuts_keys: bool
    groups: bool


GPU = Kernels(norm_copies=0, mask_bytes=1, cuts_keys=False, groups=True)
CPU = Kernels(norm_copies=1, mask_bytes=None, cuts_keys=True, groups=False)


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch between its forward and backward pass.

    ``layers``: of ordinary execution; ``loops``: of loop passes (block loops too); ``logits``: last norm, output
    projection, loss; ``kept``: kept weights of balanced loops; ``transient``: what the backward
    pass needs beside them at its worst (a recomputed layer, or the logits' gradients).
    """

    layers: int
    loops: int
    logits: int
    kept: int
    transient: int

    @property
    def saved(self) -> int:
        """What is there when the backward pass begins."""
        return self.layers + self.loops + self.logits + self.kept

    @property
    def total(self) -> int:
        """The most that is there at once."""
        return self.saved + self.transient


def activation_memory(
    config: Config,
    plan: LoopPlan,
    precision: str,
    kernels: Kernels = GPU,
    tp_rank: int | None = None,
    method: LoopMethod | None = None,
) -> Activations:
    """Bytes of one micro-batch on one rank.

    Args:
        tp_rank: rank within the tensor-parallel group; None: the one that holds most.
        method: how kept heads loop; None: what ``choose_loop_method`` says.
    """
    if tp_rank is None:
        size = config.parallel.tensor_model_parallel_size
        every = (activation_memory(config, plan, precision, kernels, rank, method) for rank in range(size))
        return max(every, key=lambda one: one.total)
    rank = _Rank(config, ELEMENT_BYTES[precision], kernels, tp_rank, method or choose_loop_method(config)[0])
    fully, selectively = config.recomputed_layers("full"), config.recomputed_layers("selective")
    layers = loops = recomputed = 0
    for index, layer in enumerate(plan):
        once = rank.layer() + sum(rank.loop_pass(layer) for _ in range(layer.loops))
        if index in fully:
            recomputed, once = max(recomputed, once), rank.stream
            layers += rank.stream
            loops += layer.block_loops * rank.stream
            continue
        rank.selective = index in selectively
        ordinary = rank.layer()
        layers += ordinary
        loops += layer.block_loops * ordinary + layer.loops * rank.loop_pass(layer)
        rank.selective = False
    logits, logits_transient = rank.logits()
    kept = sum(rank.kept_weights(layer) for layer in plan)
    return Activations(layers, loops, logits, kept, max(recomputed, logits_transient))


def peak_memory(config: Config, plans: Iterable[LoopPlan], world_size: int, precision: str) -> int:
    """Bytes on the fullest rank at the worst of ``plans``."""
    activations = max(activation_memory(config, plan, precision).total for plan in plans)
    return state_memory(config, world_size, precision).total + activations


class _Rank:
    """The operations of a layer on one rank: what each keeps, in bytes."""

    def __init__(
        self, config: Config, element: int, kernels: Kernels, tp_rank: int, method: LoopMethod
    ) -> None:
        model, train = config.model, config.train
        self.config, self.model, self.kernels = config, model, kernels
        self.element, self.method, self.tp_rank = element, method, tp_rank
        self.ranks = config.parallel.tensor_model_parallel_size
        self.sharded = config.parallel.sequence_parallel
        self.selective = False
        self.tokens = train.micro_batch_size * model.seq_length
        self.local_tokens = self.tokens // self.ranks if self.sharded else self.tokens
        self.stream = self.local_tokens * model.hidden_size * element

    def layer(self) -> int:
        """One ordinary execution of attention and MLP."""
        model = self.model
        heads, groups = model.num_attention_heads // self.ranks, model.num_query_groups // self.ranks
        attention = self.norm() + self.stream + self.fused_attention(heads, groups)
        width = model.ffn_hidden_size // self.ranks * self.tokens * self.element
        kept = 2 if model.activation == "gelu" else 3  # SwiGLU: both halves and their product
        mlp = self.norm() + self.stream + kept * width
        return attention + mlp + 2 * self.dropout()

    def loop_pass(self, plan: LayerPlan) -> int:
        """One pass of a head loop."""
        if plan.loops == 0:
            return 0
        model = self.model
        if plan.phase == "window":
            heads, groups = model.num_attention_heads // self.ranks, model.num_query_groups // self.ranks
            gated = 0 if self.selective else self._heads(heads)  # attention's output, beside the product
            kept = self.norm() + self.stream + self.fused_attention(heads, groups) + gated
        elif self.method == "owner" or self.ranks == 1:
            kept = self._owner(plan)
        else:
            kept = self._balanced(plan)
        return kept + self.dropout()

    def norm(self) -> int:
        """Input and statistics of one norm over the hidden size."""
        if self.model.normalization == "LayerNorm":
            return self.stream + 2 * _FP32 * self.local_tokens
        return (1 + self.kernels.norm_copies) * self.stream + _FP32 * self.local_tokens

    def dropout(self) -> int:
        """The mask of one residual branch."""
        if self.model.hidden_dropout == 0:
            return 0
        mask = self.element if self.kernels.mask_bytes is None else self.kernels.mask_bytes
        return self.stream // self.element * mask

    def fused_attention(self, heads: int, groups: int) -> int:
        """From the fused projection's output to the output projection's input, all heads of this rank."""
        fused = self._heads(heads + 2 * groups)
        query, key, out = self._heads(heads), self._heads(groups), self._heads(heads)
        kept = query + out + self._head_norm(heads + groups)
        if heads != groups and self.model.qk_layernorm:
            kept += query  # grouped queries are copied out of the fused projection for their norm
        if self.selective:
            return kept + key + fused  # values are a view of the fused projection
        kept += self._statistics(heads, self.tokens)
        if heads == groups or (self.kernels.groups and self.element < _FP32):
            return kept + key + fused
        # Grouped keys and values are repeated; the norm of the keys still holds the fused projection.
        return kept + 2 * self._heads(heads) + (fused if self.model.qk_layernorm else 0)

    def _owner(self, plan: LayerPlan) -> int:
        model = self.model
        layout = HeadLayout(
            model.num_attention_heads, model.num_query_groups, model.kv_channels, self.ranks, self.tp_rank
        )
        mine = layout.local(plan.kept_heads)
        heads, groups = len(mine.heads), len(mine.groups)
        tokens_in = self.tokens * model.hidden_size * self.element  # gathered under sequence parallelism
        if not heads:  # empty tensors, which q/k norms keep as views of their input
            return self.norm() + (tokens_in if model.qk_layernorm else 0)
        rows = (2 * heads + 2 * groups) * model.kv_channels * model.hidden_size * self.element
        return self.norm() + tokens_in + rows + self.kept_attention(heads, groups)

    def kept_attention(self, heads: int, groups: int) -> int:
        """As ``fused_attention``; shared groups are indexed into copies before the attention."""
        fused, query, key, out = (self._heads(n) for n in (heads + 2 * groups, heads, groups, heads))
        kept = query + out + self._head_norm(heads + groups)
        kept += 0 if self.selective else self._statistics(heads, self.tokens)
        if heads == groups:
            return kept + key + fused
        return kept + 2 * self._heads(heads) + (fused if self.model.qk_layernorm else 0)

    def _balanced(self, plan: LayerPlan) -> int:
        model = self.model
        heads, groups = kept_counts(self.config, plan.kept_heads)
        share = self.tokens // self.ranks
        own = self._heads(heads, share)
        visible = (self.tp_rank + 1) * share
        if heads != groups or (self.kernels.cuts_keys and self.tp_rank > 0 and not self.selective):
            keys = 2 * self._heads(heads, visible)
        else:
            keys = 2 * self._heads(groups)
        kept = self.norm() + self.stream + 2 * own + keys
        kept += 0 if self.selective else self._statistics(heads, share)
        if model.qk_layernorm:
            norms = self._head_norm(heads + groups, share)
            kept += norms + self._heads(heads + 2 * groups, share)
        if not self.sharded:
            kept += self._heads(heads)  # gathered outputs
        return kept

    def kept_weights(self, plan: LayerPlan) -> int:
        """Fetched once per step. Not counted: fp32 sums of their gradients between micro-batches."""
        if plan.phase != "sparse" or self.method != "balanced" or self.ranks == 1:
            return 0
        heads, groups = kept_counts(self.config, plan.kept_heads)
        rows = (2 * heads + 2 * groups) * self.model.kv_channels * self.model.hidden_size
        return rows * self.element

    def logits(self) -> tuple[int, int]:
        """(kept, transient) of last norm, output projection and vocabulary-parallel loss, which is fp32."""
        rows = self.tokens * self.model.padded_vocab_size() // self.ranks
        softmax, token_data = _FP32 * rows, 17 * self.tokens
        # Backward: the gradient in the element type, next to the softmax that it is computed in.
        gradient = 0 if self.element == _FP32 else self.element * rows
        embedding = self.dropout() + (9 * self.tokens if self.ranks > 1 else 0)
        return self.norm() + self.stream + softmax + token_data + embedding, gradient

    def _heads(self, count: int, tokens: int | None = None) -> int:
        return (self.tokens if tokens is None else tokens) * count * self.model.kv_channels * self.element

    def _statistics(self, heads: int, tokens: int) -> int:
        return _FP32 * heads * tokens

    def _head_norm(self, heads: int, tokens: int | None = None) -> int:
        """Statistics of q/k norms, and their normalised copies; their input is the fused projection."""
        if not self.model.qk_layernorm:
            return 0
        count = self.tokens if tokens is None else tokens
        return self.kernels.norm_copies * self._heads(heads, count) + self._statistics(heads, count)
