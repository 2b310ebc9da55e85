"""One record per kind of attention. There is one: causal, with grouped keys and values.

Symbols: N query heads, G key/value groups, H head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_sgt.arch.flops import Flops
from megatron_sgt.arch.kernels import Kernels
from megatron_sgt.arch.weight import Weight, linear, norm
from megatron_sgt.config.model import ModelConfig

_FP32 = 4


@dataclass(frozen=True)
class CausalAttention:
    """softmax(Q·Kᵀ / √H)·V over a token and those before it. ``module``: its entry in ``model.spec.ATTENTIONS``.

    ``layer``: index of the layer. The counts of heads and groups are arguments where a rank, or a loop, has only some.
    """

    module: str = "causal"

    def weights(self, model: ModelConfig, layer: int) -> Iterator[Weight]:
        """linear_qkv [(N + 2·G)·H, D], linear_proj [D, N·H], and the norms of queries and keys.

        Norms of each head are [H], over all heads [N·H] and [G·H], of which a rank holds the weights of its heads.
        """
        hidden, size = model.hidden_size, model.kv_channels
        queries, keys = model.num_attention_heads * size, model.num_query_groups * size
        megatron, hf = f"decoder.layers.{layer}.self_attention", f"model.layers.{layer}.self_attn"
        qkv = {f"{hf}.{x}_proj": (rows, hidden) for x, rows in (("q", queries), ("k", keys), ("v", keys))}
        any_bias = model.add_bias_linear or model.add_qkv_bias
        yield from linear(f"{megatron}.linear_qkv", qkv, "qkv", "attention", any_bias)
        if model.qk_layernorm:
            for x, rows in (("q", queries), ("k", keys)):
                name, hf_name = f"{megatron}.{x}_layernorm", f"{hf}.{x}_norm"
                yield from (
                    norm(name, hf_name, rows, split="rows") if model.norms_all_heads else norm(name, hf_name, size)
                )
        out = {f"{hf}.o_proj": (hidden, queries)}
        yield from linear(f"{megatron}.linear_proj", out, "columns", "attention", model.add_bias_linear)

    def flops(
        self,
        model: ModelConfig,
        layer: int,
        sequences: int,
        heads: int,
        groups: int,
        entropy: bool = False,
        square: float | None = None,
    ) -> Flops:
        """Operations of one pass of ``heads`` query heads on ``groups`` key/value groups.

        Under norms over all heads queries, keys and values of all are projected, however few of them attend.

        Args:
            sequences: of ``model.seq_length`` tokens.
            entropy: the last token's attention entropies are measured as well.
            square: mean over the sequences of the sum of the squares of their documents' lengths, where no token
                attends to another document; None: a sequence is one document.
        """
        length, size = model.seq_length, model.kv_channels
        if model.norms_all_heads:
            projected = model.num_attention_heads + 2 * model.num_query_groups
        else:
            projected = heads + 2 * groups
        projections = (projected + heads) * size
        return Flops(
            linear=2 * sequences * length * model.hidden_size * projections,
            attention=round(4 * sequences * heads * size * (length * length if square is None else square)),
            entropy=2 * sequences * heads * length * size if entropy else 0,
        )

    def saved_bytes(
        self,
        model: ModelConfig,
        layer: int,
        heads: int,
        groups: int,
        tokens: int,
        element: int,
        kernels: Kernels,
        *,
        recomputed: bool = False,
        indexed: bool = False,
        projected: int | None = None,
    ) -> int:
        """What is kept from the output of linear_qkv to the input of linear_proj, in bytes.

        Args:
            element: bytes of one element of an activation.
            recomputed: the attention itself is computed again in the backward pass.
            indexed: the heads are kept heads of a loop, whose shared groups are indexed into copies.
            projected: heads and groups that are normalised, where that are more than those that attend.
        """
        head, apart = tokens * model.kv_channels * element, model.norms_all_heads
        fused = (heads + 2 * groups) * head
        normalised = heads + groups if projected is None else projected
        kept = 2 * heads * head + self.head_norm_bytes(model, layer, normalised, tokens, element, kernels)
        if heads != groups and model.qk_layernorm and not apart and not indexed:
            kept += heads * head  # grouped queries are copied out of the fused projection for their norm
        if not recomputed:
            kept += _FP32 * heads * tokens  # the softmax's statistics
        reads_groups = recomputed or (kernels.groups and element < _FP32)
        if heads == groups or (reads_groups and not indexed):
            # Values are a view of the fused projection, if they are not selected from it.
            return kept + groups * head + (groups * head if apart and indexed else fused)
        # Grouped keys and values are repeated; the norm of the keys still holds the fused projection.
        return kept + 2 * heads * head + (fused if model.qk_layernorm and not apart else 0)

    def head_norm_bytes(
        self, model: ModelConfig, layer: int, heads: int, tokens: int, element: int, kernels: Kernels
    ) -> int:
        """Statistics of q/k norms, and their normalised copies; their input is the fused projection.

        Norms over all heads copy their input out of it, and where ranks share the heads keep no normalised copies.
        """
        if not model.qk_layernorm:
            return 0
        if model.norms_all_heads:
            whole = heads == model.num_attention_heads + model.num_query_groups
            copies = 1 + (kernels.norm_copies if whole else 0)
            return tokens * (copies * heads * model.kv_channels * element + 2 * _FP32)
        copies = kernels.norm_copies * heads * model.kv_channels * element
        return tokens * (copies + _FP32 * heads)

    def hf_fields(self, model: ModelConfig) -> dict[str, Any]:
        """Its fields in the config.json of an exported model, beside those that every architecture has."""
        return {
            "qk_norm": model.qk_layernorm,
            **({"qk_norm_over": "all"} if model.norms_all_heads else {}),
            "attention_bias": model.add_qkv_bias or model.add_bias_linear,
            "attention_out_bias": model.add_bias_linear,
        }


CAUSAL = CausalAttention()
