"""Compiles the kernels of the loops before the first step.

Triton compiles a program at its first launch. Without a warm-up that would be in the middle of a run, at the first
growth and at the end of its window, with all ranks waiting and the watch counting. So every kind of loop pass that the
schedule can bring is executed once, forward and backward, on zeros of the run's own shapes, at each of its sequence
lengths, and where samples tell their documents with some, too: everything that Triton specialises on (types, integers
that are 1 or divisible by 16, splits of the keys) is then as in training. The model is not touched, no random number is
drawn, and no rank is waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.config import Config
from megatron_sgt.data.document_samples import DOCUMENT_KEYS
from megatron_sgt.model.documents import DocumentMask, DocumentRules
from megatron_sgt.model.loop_backend import loop_backend
from megatron_sgt.model.loop_pass import LoopOptions
from megatron_sgt.model.mcore_config import DTYPES
from megatron_sgt.ops import fused_loop, operators
from megatron_sgt.ops.attention import causal_attention
from megatron_sgt.ops.backend import choose_attention
from megatron_sgt.ops.head_blocks import HeadBlocks
from megatron_sgt.ops.rotary import Rotary
from megatron_sgt.ops.shard_attention import shard_attention
from megatron_sgt.ops.tiles import arch_of
from megatron_sgt.parallel.device import synchronize
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.parallel.packed_copy import on_device
from megatron_sgt.planning.structure import most_kept_heads


@dataclass(frozen=True)
class _Kind:
    """Kept heads that one rank loops together: how many, and in how many key/value groups."""

    heads: int
    groups: int

    def specialised(self) -> tuple[int, ...]:
        counts = (self.groups, self.heads + self.groups, self.heads + 2 * self.groups)
        return self.heads, *(n if n == 1 else n % 16 == 0 for n in counts)

    def example(self, layout: HeadLayout) -> tuple[int, ...]:
        """Global ids of such heads on the rank of ``layout``, spread over its first groups."""
        first, each = layout.owned_heads.start, layout.heads_per_group
        spread = [first + g * each + member for member in range(each) for g in range(self.groups)]
        return tuple(sorted(spread[: self.heads]))


def warm_up_loops(config: Config, groups: ParallelGroups, precision: str) -> int:
    """Compile what loops of ``config`` will launch on this rank through Triton; returns how many kinds of passes."""
    sparse, _ = loop_backend(config, precision, groups.device)
    if sparse != "triton" or not most_kept_heads(config):
        return 0
    layout = HeadLayout.of(config.model, groups.tp_size, groups.tp_rank)
    count = 0
    for seq_length in config.seq_lengths.every:
        passes = _Passes(config, layout, DTYPES[precision], groups.device, seq_length)
        kinds = {kind.specialised(): kind for kind in passes.kinds()}
        for mask in passes.masks():
            for kind in kinds.values():
                passes.execute(kind, mask)
            passes.ordinary_entropy(mask)
        count += len(kinds)
    synchronize(groups.device)
    return count


class _Passes:
    """Loop passes on zeros, by the way that the layers of a configuration take (see ``loop_pass``)."""

    def __init__(
        self, config: Config, layout: HeadLayout, dtype: torch.dtype, device: torch.device, seq_length: int
    ) -> None:
        self.config, self.model, self.device, self.dtype = config, config.model, device, dtype
        self.layout, self.options = layout, LoopOptions.of(config, layout, fused=True)
        self.balanced = self.options.balanced
        # Balanced, every rank loops all kept heads for its share of the tokens.
        self.held = replace(layout, tp_size=1, tp_rank=0) if self.balanced else layout
        self.length = seq_length
        self.batch = config.train.micro_batch_size * (self.model.seq_length // seq_length)
        self.queries = seq_length // (layout.tp_size if self.balanced else 1)
        self.zeros = partial(torch.zeros, dtype=dtype, device=device, requires_grad=True)

    def kinds(self) -> Iterator[_Kind]:
        """All kinds that kept heads can form on this rank. Where each rank loops its own, some ranks have fewer."""
        held = self.held
        most = min(most_kept_heads(self.config), held.heads_per_rank)
        for heads in range(1, most + 1) if held.tp_size > 1 else (most,):
            fewest = -(-heads // held.heads_per_group)
            yield from (_Kind(heads, g) for g in range(fewest, min(heads, held.groups_per_rank) + 1))

    def masks(self) -> Iterator[DocumentMask | None]:
        """Those with which kernels are called: none, and documents."""
        yield None
        rules = DocumentRules.of(self.config)
        if rules.told:
            starts = torch.zeros(self.batch, self.length, dtype=torch.int32)
            starts[:, self.length // 2 :] = self.length // 2
            tokens = torch.full((self.batch,), self.length, dtype=torch.int32)
            mask = rules.mask_of(dict(zip(DOCUMENT_KEYS, (starts, tokens), strict=True)), 1, self.device)
            assert mask is not None
            yield mask

    def execute(self, kind: _Kind, mask: DocumentMask | None = None) -> None:
        blocks = on_device(self.options.blocks(kind.example(self.held)), self.device)
        size, width = self.layout.head_dim, self.model.hidden_size
        if not self.options.fuses_projections:
            counts = [kind.heads, kind.groups, kind.groups]
            fused = self.zeros(self.queries, self.batch, sum(counts), size)
            query, key, value = fused.split(counts, dim=2)
            query, key = query.contiguous(), key.contiguous()  # as the rotation leaves them
            out = self._attend(query, key, value, blocks, kind, mask)
            out.backward(torch.zeros_like(out))
            return
        rows = len(blocks.row_index) if blocks.whole else self._local_rows()
        columns = len(blocks.column_index) if blocks.whole else self.layout.heads_per_rank * size
        x = self.zeros(self.queries, self.batch, width)
        bias = self.zeros(rows) if self.model.add_bias_linear or self.model.add_qkv_bias else None
        norms = (self.zeros(size), self.zeros(size)) if self.model.qk_layernorm else None
        sequences = [] if mask is None or mask.positions is None else [self.batch]
        angles = torch.zeros(self.queries, *sequences, size // 2, device=self.device)
        query, key, value, residual = fused_loop.project_in(
            x, self.zeros(width), self.zeros(rows, width), bias, norms, blocks,
            Rotary(angles, angles), self.model.layernorm_epsilon,
        )  # fmt: skip
        out = self._attend(query, key, value, blocks, kind, mask)
        out = fused_loop.project_out(out, residual, self.zeros(width, columns), blocks)
        out.backward(torch.zeros_like(out))

    def _local_rows(self) -> int:
        heads, groups = self.layout.heads_per_rank, self.layout.groups_per_rank
        return (heads + 2 * groups) * self.layout.head_dim

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: HeadBlocks, kind: _Kind, mask: DocumentMask | None
    ) -> Tensor:
        """As ``KeptLoop.attend``."""
        documents = None if mask is None else mask.attention
        if self.balanced:
            everyone = torch.cat([key, value], dim=2).repeat(self.layout.tp_size, 1, 1, 1)
            seen = everyone[: (self.layout.tp_rank + 1) * self.queries]
            key, value = seen.split([kind.groups, kind.groups], dim=2)
        pairs, size, length = self.batch * kind.heads, self.layout.head_dim, key.shape[0]
        wanted = self.config.train.loop_attention
        if choose_attention(pairs, length, size, arch_of(query), wanted) == "custom":
            measured, _ = fused_loop.attend(query, key, value, blocks, True, documents)
            return measured + fused_loop.attend(query, key, value, blocks, False, documents)[0]
        if kind.groups != kind.heads:
            key, value = key[:, :, blocks.slot_index], value[:, :, blocks.slot_index]
        self._entropy(query, key, mask)
        return (shard_attention if self.balanced else causal_attention)(query, key, value, documents=documents)

    def _entropy(self, query: Tensor, key: Tensor, mask: DocumentMask | None) -> None:
        documents = None if mask is None else mask.attention
        fewest = 2 if mask is None else mask.fewest
        operators.last_row_entropy(query.detach(), key.detach(), documents, fewest)

    def ordinary_entropy(self, mask: DocumentMask | None = None) -> None:
        """Entropies of the ordinary attention and of a window's passes: all heads of this rank."""
        shape = (self.length, self.batch)
        query = self.zeros(*shape, self.layout.heads_per_rank, self.layout.head_dim)
        key = self.zeros(*shape, self.layout.groups_per_rank, self.layout.head_dim)
        self._entropy(query, key, mask)
