"""Bytes of one micro-batch's activations on one rank.

Activations are what autograd keeps from forward to backward, listed operation by operation below for this project's
layers; what the backward pass adds on top for a moment is in ``Activations.transient``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_sgt.arch.attention import CAUSAL
from megatron_sgt.arch.ffn import ffn_kind
from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.arch.kernels import GPU, Kernels
from megatron_sgt.arch.weight import ELEMENT_BYTES
from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.planning.loop_cost import LoopMethod, choose_loop_method

_FP32 = 4


@dataclass(frozen=True)
class Activations:
    """Bytes of micro-batches between their forward and backward pass.

    ``layers``: of ordinary execution, interleaved also the outputs of chunks; ``loops``: of loop passes (block loops
    too); ``logits``: last norm, output projection, loss, and what the embedding keeps; ``kept``: kept weights of
    balanced loops; ``transient``: what the backward pass needs beside them at its worst (a recomputed layer, or the
    logits' gradients; in a pipeline also what was received for the next pass).
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


@dataclass(frozen=True)
class Part:
    """A share of the model: layers, and whether the embedding, and last norm, output layer and loss are in it."""

    layers: range
    embedding: bool = True
    output: bool = True


def activation_memory(
    config: Config,
    plan: LoopPlan,
    precision: str,
    kernels: Kernels = GPU,
    tp_rank: int | None = None,
    method: LoopMethod | None = None,
    part: Part | None = None,
) -> Activations:
    """Bytes of one micro-batch on one rank.

    Args:
        tp_rank: rank within the tensor-parallel group; None: the one that holds most.
        method: how kept heads loop; None: what ``choose_loop_method`` says.
        part: of the model; None: all of it.
    """
    part = part or Part(range(config.model.num_layers))
    method = method or choose_loop_method(config)[0]
    if tp_rank is None:
        # Only loops differ between ranks.
        size = config.parallel.tensor_model_parallel_size if plan.layers else 1
        every = (activation_memory(config, plan, precision, kernels, rank, method, part) for rank in range(size))
        return max(every, key=lambda one: one.total)
    shape = Shape.of(config, precision, kernels)
    rank, whole, without_core = _Rank(shape, tp_rank, method), _ordinary(shape, False), _ordinary(shape, True)
    fully, selectively = set(config.recomputed_layers("full")), set(config.recomputed_layers("selective"))
    plans = dict(plan.layers)
    layers = loops = kept = recomputed = 0
    for index in part.layers:
        layer = plans.get(index)
        rank.selective = index in selectively
        looping = 0 if layer is None else layer.loops * rank.loop_pass(index, layer)
        kept += 0 if layer is None else rank.kept_weights(layer)
        repeated = 0 if layer is None else layer.block_loops
        if index in fully:
            recomputed = max(recomputed, whole[index] + looping)
            layers += shape.stream
            loops += repeated * shape.stream
            continue
        ordinary = (without_core if rank.selective else whole)[index]
        layers += ordinary
        loops += repeated * ordinary + looping
    logits, logits_transient = rank.logits() if part.output else (0, 0)
    logits += rank.embedding() if part.embedding else 0
    return Activations(layers, loops, logits, kept, max(recomputed, logits_transient))


@dataclass(frozen=True)
class Shape:
    """All that the activations of a layer without loops depend on: the same on every tensor-parallel rank."""

    model: ModelConfig
    micro_batch_size: int
    ranks: int
    sharded: bool
    element: int
    kernels: Kernels

    @classmethod
    def of(cls, config: Config, precision: str, kernels: Kernels) -> Shape:
        parallel = config.parallel
        tensor, sharded = parallel.tensor_model_parallel_size, parallel.sequence_parallel
        element = ELEMENT_BYTES[precision]
        return cls(config.model, config.train.micro_batch_size, tensor, sharded, element, kernels)

    @property
    def tokens(self) -> int:
        return self.micro_batch_size * self.model.seq_length

    @property
    def local_tokens(self) -> int:
        """Those of norms, dropout and residuals."""
        return self.tokens // self.ranks if self.sharded else self.tokens

    @property
    def stream(self) -> int:
        """Bytes of what flows from layer to layer."""
        return self.local_tokens * self.model.hidden_size * self.element


@lru_cache(maxsize=256)
def _ordinary(shape: Shape, selective: bool) -> tuple[int, ...]:
    """Bytes of every layer's ordinary execution."""
    rank = _Rank(shape, 0, "owner")
    rank.selective = selective
    return tuple(rank.layer(index) for index in range(shape.model.num_layers))


class _Rank:
    """The operations of a layer on one rank: what each keeps, in bytes."""

    def __init__(self, shape: Shape, tp_rank: int, method: LoopMethod) -> None:
        self.model, self.kernels, self.element = shape.model, shape.kernels, shape.element
        self.looping, self.tp_rank, self.ranks, self.sharded = method, tp_rank, shape.ranks, shape.sharded
        self.own_heads = self.model.num_attention_heads // self.ranks, self.model.num_query_groups // self.ranks
        self.selective = False
        self.tokens, self.local_tokens, self.stream = shape.tokens, shape.local_tokens, shape.stream

    def layer(self, index: int) -> int:
        attention = self.norm() + self.stream + self.attention(index, *self.own_heads)
        ffn = ffn_kind(self.model.activation).saved_elements(self.model, index, self.tokens)
        mlp = self.norm() + self.stream + ffn // self.ranks * self.element
        return attention + mlp + 2 * self.dropout()

    def loop_pass(self, index: int, plan: LayerPlan) -> int:
        if plan.loops == 0:
            return 0
        if plan.phase == "window":
            gated = 0 if self.selective else self._heads(self.own_heads[0])  # attention's output, beside the product
            kept = self.norm() + self.stream + self.attention(index, *self.own_heads) + gated
        elif self.looping == "owner" or self.ranks == 1:
            kept = self._owner(index, plan)
        else:
            kept = self._balanced(index, plan)
        return kept + self.dropout()

    def norm(self) -> int:
        if self.model.normalization == "LayerNorm":
            return self.stream + 2 * _FP32 * self.local_tokens
        return (1 + self.kernels.norm_copies) * self.stream + _FP32 * self.local_tokens

    def dropout(self) -> int:
        if self.model.hidden_dropout == 0:
            return 0
        mask = self.element if self.kernels.mask_bytes is None else self.kernels.mask_bytes
        return self.stream // self.element * mask

    def attention(
        self, layer: int, heads: int, groups: int, indexed: bool = False, projected: int | None = None
    ) -> int:
        """From the fused projection's output to the output projection's input."""
        return CAUSAL.saved_bytes(
            self.model, layer, heads, groups, self.tokens, self.element, self.kernels,
            recomputed=self.selective, indexed=indexed, projected=projected,
        )  # fmt: skip

    def _owner(self, index: int, plan: LayerPlan) -> int:
        model = self.model
        heads, groups = HeadLayout.of(model, self.ranks, self.tp_rank).kept_counts(plan.kept_heads)
        column = model.kv_channels * model.hidden_size * self.element  # of a projection, for one head
        if model.norms_all_heads:
            attention = self.attention(index, heads, groups, indexed=True, projected=sum(self.own_heads))
            return self.norm() + self.stream + heads * column + attention
        tokens_in = self.tokens * model.hidden_size * self.element  # gathered under sequence parallelism
        if not heads:  # empty tensors, which q/k norms keep as views of their input
            return self.norm() + (tokens_in if model.qk_layernorm else 0)
        rows = (2 * heads + 2 * groups) * column
        return self.norm() + tokens_in + rows + self.attention(index, heads, groups, indexed=True)

    def _balanced(self, index: int, plan: LayerPlan) -> int:
        model = self.model
        heads, groups = HeadLayout.of(self.model).kept_counts(plan.kept_heads)
        share = self.tokens // self.ranks
        own = self._heads(heads, share)
        visible = (self.tp_rank + 1) * share
        if heads != groups or (self.kernels.cuts_keys and self.tp_rank > 0 and not self.selective):
            keys = 2 * self._heads(heads, visible)
        else:
            keys = 2 * self._heads(groups)
        kept = self.norm() + self.stream + 2 * own + keys
        kept += 0 if self.selective else _FP32 * heads * share
        if model.qk_layernorm:
            norms = CAUSAL.head_norm_bytes(model, index, heads + groups, share, self.element, self.kernels)
            kept += norms + self._heads(heads + 2 * groups, share)
        if not self.sharded:
            kept += self._heads(heads)  # gathered outputs
        return kept

    def kept_weights(self, plan: LayerPlan) -> int:
        """Fetched once per step. Not counted: fp32 sums of their gradients between micro-batches."""
        if plan.phase != "sparse" or self.looping != "balanced" or self.ranks == 1:
            return 0
        heads, groups = HeadLayout.of(self.model).kept_counts(plan.kept_heads)
        rows = (2 * heads + 2 * groups) * self.model.kv_channels * self.model.hidden_size
        return rows * self.element

    def logits(self) -> tuple[int, int]:
        """(kept, transient) of last norm, output projection and vocabulary-parallel loss, which is fp32."""
        rows = self.tokens * self.model.padded_vocab_size() // self.ranks
        softmax, token_data = _FP32 * rows, 17 * self.tokens
        # Backward: the gradient in the element type, next to the softmax that it is computed in.
        gradient = 0 if self.element == _FP32 else self.element * rows
        return self.norm() + self.stream + softmax + token_data, gradient

    def embedding(self) -> int:
        """Its dropout mask, and which tokens lie in other ranks' share of the vocabulary."""
        return self.dropout() + (9 * self.tokens if self.ranks > 1 else 0)

    def _heads(self, count: int, tokens: int | None = None) -> int:
        return (self.tokens if tokens is None else tokens) * count * self.model.kv_channels * self.element
