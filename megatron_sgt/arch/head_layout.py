"""The one owner of the mapping: global head <-> tensor-parallel rank <-> rows of W_qkv, columns of W_o.

Megatron-Core stores the fused query-key-value weight by query group: for each group its ``heads_per_group``
query blocks, then one key block and one value block, each ``head_dim`` rows high. A tensor-parallel rank
holds a contiguous range of groups, therefore a contiguous range of heads. Everything that must know this
(looping kept heads, gates, entropies, weight conversion) asks this module.

Symbols: N query heads, G groups, H head size (see the legend in ``megatron_sgt.model``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sgt.config.model import ModelConfig


@dataclass(frozen=True)
class KeptHeads:
    """The part of a set of kept heads that one rank owns, as indices into its own weights.

    ``heads``: local head indices, ascending. ``groups``: local group indices that those heads read, ascending,
    each once. ``kv_slot[i]``: position in ``groups`` of head i's keys and values. ``qkv_rows``: rows of the
    local fused weight, ordered query blocks (by head), key blocks, value blocks (by group).
    ``proj_columns``: columns of the local output projection, ordered by head.
    """

    heads: tuple[int, ...]
    groups: tuple[int, ...]
    kv_slot: tuple[int, ...]
    qkv_rows: tuple[int, ...]
    proj_columns: tuple[int, ...]


@dataclass(frozen=True)
class HeadLayout:
    """Attention heads of one model as seen by one tensor-parallel rank. All fields are counts or indices."""

    num_heads: int
    num_groups: int
    head_dim: int
    tp_size: int = 1
    tp_rank: int = 0

    def __post_init__(self) -> None:
        for name, count in (("num_heads", self.num_heads), ("num_groups", self.num_groups)):
            if count % self.tp_size:
                raise ValueError(f"{name} {count} is not divisible by tensor parallel size {self.tp_size}")
        if self.num_heads % self.num_groups:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_groups {self.num_groups}")

    @classmethod
    def of(cls, model: ModelConfig, tp_size: int = 1, tp_rank: int = 0) -> HeadLayout:
        return cls(model.num_attention_heads, model.num_query_groups, model.kv_channels, tp_size, tp_rank)

    @property
    def heads_per_rank(self) -> int:
        return self.num_heads // self.tp_size

    @property
    def groups_per_rank(self) -> int:
        return self.num_groups // self.tp_size

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_groups

    @property
    def owned_heads(self) -> range:
        start = self.tp_rank * self.heads_per_rank
        return range(start, start + self.heads_per_rank)

    def owner(self, head: int) -> int:
        """Tensor-parallel rank that holds global head ``head``."""
        return head // self.heads_per_rank

    def kept_counts(self, kept_heads: Sequence[int]) -> tuple[int, int]:
        """(heads, groups that they read): how many of the global ``kept_heads`` this rank owns."""
        heads = [head for head in kept_heads if head in self.owned_heads]
        return len(heads), len({head // self.heads_per_group for head in heads})

    def local(self, kept_heads: Sequence[int]) -> KeptHeads:
        first = self.owned_heads.start
        heads = tuple(head - first for head in sorted(kept_heads) if head in self.owned_heads)
        groups = tuple(sorted({head // self.heads_per_group for head in heads}))
        slot_of = {group: slot for slot, group in enumerate(groups)}
        rows: list[int] = []
        for head in heads:
            rows += self._block(head // self.heads_per_group, head % self.heads_per_group)
        for part in (0, 1):
            for group in groups:
                rows += self._block(group, self.heads_per_group + part)
        columns = [c for head in heads for c in range(head * self.head_dim, (head + 1) * self.head_dim)]
        return KeptHeads(
            heads=heads,
            groups=groups,
            kv_slot=tuple(slot_of[head // self.heads_per_group] for head in heads),
            qkv_rows=tuple(rows),
            proj_columns=tuple(columns),
        )

    def _block(self, group: int, member: int) -> range:
        start = (group * (self.heads_per_group + 2) + member) * self.head_dim
        return range(start, start + self.head_dim)

    def fused_qkv_order(self) -> list[int]:
        """Row i of the whole model's fused weight is row ``order[i]`` of the stacked [W_q; W_k; W_v].

        The stacked matrix is the order of Hugging Face: all query heads, all key groups, all value groups.
        """
        query_rows = self.num_heads * self.head_dim
        kv_rows = self.num_groups * self.head_dim
        order: list[int] = []
        for group in range(self.num_groups):
            first_head = group * self.heads_per_group
            order += range(first_head * self.head_dim, (first_head + self.heads_per_group) * self.head_dim)
            for offset in (query_rows, query_rows + kv_rows):
                order += range(offset + group * self.head_dim, offset + (group + 1) * self.head_dim)
        return order
