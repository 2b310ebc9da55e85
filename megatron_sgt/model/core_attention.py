"""Core attention for Megatron's spec slot: library attention, gates of a loop pass, entropy of the last row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_sgt.model.documents import DocumentMask, document_mask
from megatron_sgt.model.entropy_meter import EntropyMeter
from megatron_sgt.ops.attention import causal_attention
from megatron_sgt.ops.documents import Documents
from megatron_sgt.ops.entropy import last_row_entropy
from megatron_sgt.ops.operators import last_row_entropy as fused_entropy
from megatron_sgt.ops.rotary import Rotary, rotate_halves, rotate_heads
from megatron_sgt.parallel.rng import recompute_contexts


class SGTCoreAttention(torch.nn.Module):
    """Causal attention of all heads of this rank.

    ``loop_pass(p, gates)`` marks a call as pass p (1..K) of a loop and multiplies each head's output by its gate;
    outside of it a call is pass 0, the ordinary attention, to which gates do not apply. Within ``rotated(rotary)``
    queries and keys are rotated in here.

    Args (beyond Megatron-Core's):
        fused: measure entropies in one kernel that copies no keys.
        loop_attention: ``train.loop_attention``, for the loops.
        fused_rotary: rotate queries and keys of all heads in one compiled function (``ops.rotary``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        meter: EntropyMeter,
        recompute: tuple[int, ...],
        fused: bool = False,
        loop_attention: Literal["auto", "custom", "library"] = "auto",
        fused_rotary: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.layer_id = layer_number - 1  # Megatron counts layers from 1
        self.meter = meter
        self.recompute = self.layer_id in recompute
        self.entropy: Callable[..., Tensor] = fused_entropy if fused else last_row_entropy
        self.loop_attention = loop_attention
        self.fused_rotary = fused_rotary
        self.dropout_p = config.attention_dropout
        self._pass = 0
        self._gates: Tensor | None = None
        self._rotary: Rotary | None = None

    @contextlib.contextmanager
    def rotated(self, rotary: Rotary) -> Iterator[None]:
        """Rotate queries and keys of the calls in the body; Megatron-Core then must not."""
        self._rotary = rotary
        try:
            yield
        finally:
            self._rotary = None

    @contextlib.contextmanager
    def loop_pass(self, index: int, gates: Tensor) -> Iterator[None]:
        """Make the calls in the body loop pass ``index`` with ``gates`` [N]."""
        self._pass, self._gates = index, gates
        try:
            yield
        finally:
            self._pass, self._gates = 0, None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: object | None = None,
        /,
        *,
        packed_seq_params: object | None = None,
        **_: Any,
    ) -> Tensor:
        """query [S, B, N, H], key and value [S, B, G, H] -> [S, B, N * H]. The mask is always causal.

        Args:
            attention_mask: a DocumentMask, or None.

        Raises:
            ValueError: another mask, or packed sequences.
        """
        mask = document_mask(attention_mask)
        if packed_seq_params is not None:
            raise ValueError("packed sequences are not supported: the last query row would span documents")
        if (rotary := self._rotary) is not None:
            query, key = (
                rotate_heads(query, key, rotary)
                if self.fused_rotary
                else (rotate_halves(query, rotary), rotate_halves(key, rotary))
            )
        if self.training and self.meter.enabled:
            self.meter.store(self.layer_id, self._pass, self.measured(query, key, mask))
        out = self.attend(query, key, value, None if mask is None else mask.attention)
        # The gate stays outside of the recomputed part: at recompute time the pass is no longer marked.
        if self._gates is not None:
            out = out * self._gates.to(out.dtype).unsqueeze(-1)
        return out.reshape(*out.shape[:2], -1)

    def measured(self, query: Tensor, key: Tensor, mask: DocumentMask | None) -> Tensor:
        """Entropies [N] for the meter, of the last rows of query [Q, B, N, H]: with ``mask`` sums over sequences."""
        query, key = query.detach(), key.detach()
        if mask is None:
            return self.entropy(query, key)
        if mask.attention is None:
            return self.entropy(query, key) * mask.counted
        return self.entropy(query, key, mask.attention, mask.fewest)[0]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None = None) -> Tensor:
        """Causal attention of any heads [S, B, *, H] with this module's dropout and recompute settings."""
        return self.run(partial(self._attend, documents=documents), query, key, value)

    def run(self, attention: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``attention(*tensors)``, computed again in the backward pass if this module is set to."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(attention, *tensors, use_reentrant=False, context_fn=recompute_contexts)
        return attention(*tensors)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        if not self.training or self.dropout_p == 0.0:
            return causal_attention(query, key, value, documents=documents)
        with get_cuda_rng_tracker().fork():  # heads are sharded: every rank draws its own mask
            return causal_attention(query, key, value, self.dropout_p, documents=documents)
