"""Which tokens of a sequence belong to which document, for attention that never leaves a document.

Query i of sequence b then looks at the keys ``starts[b, i]`` .. i only. No T x T mask is ever made: a fast version
attends document by document, or hands the starts (and, backward, the ends) to its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of the sequences of a micro-batch [B, S].

    Attributes:
        lengths: on the host, for each sequence the tokens of its documents in order; they sum to S. Padding at the end
            of a sequence is a document of its own.
        num_tokens: on the host, the tokens of each sequence before its padding: S where there is none.
        starts: [B, S] int32 on the device of the micro-batch: where the document of each token begins.
        ends: [B, S] int32: the position after its last token.
        last: [B] int32: the position of the last token before the padding; -1 where there is none.
        offsets: [documents + 1] int32: where the documents begin in [B · S], sequence by sequence, and B · S; what
            variable-length kernels call ``cu_seqlens``.
    """

    lengths: tuple[tuple[int, ...], ...]
    num_tokens: tuple[int, ...]
    starts: Tensor
    ends: Tensor
    last: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, starts: Tensor, num_tokens: Tensor, device: torch.device | str = "cpu") -> Documents | None:
        """From what a micro-batch on the host says; None if each sequence is one document, without padding.

        Args:
            starts: [B, S] int32, ``num_tokens``: [B] int32, as above, both on the CPU.
            device: where the tensors are needed.
        """
        batch, size = starts.shape
        place = torch.arange(size, dtype=torch.int32)
        begins = starts == place
        if int(begins.sum()) == batch and int(num_tokens.min()) == size:
            return None
        flat = begins.flatten().nonzero().flatten().int()
        offsets = torch.cat([flat, flat.new_tensor([batch * size])])
        sizes = offsets.diff()
        ends = (offsets[1:].repeat_interleave(sizes)).view(batch, size) - (
            torch.arange(batch, dtype=torch.int32)[:, None] * size
        )
        counts = begins.sum(1).tolist()
        lengths = tuple(tuple(part.tolist()) for part in sizes.split(counts))
        there = (t.to(device, non_blocking=True) for t in (starts, ends, num_tokens.int() - 1, offsets))
        return cls(lengths, tuple(num_tokens.tolist()), *there)

    def shares(self, queries: int, keys: int) -> list[list[tuple[int, int]]]:
        """For each sequence, how many of the queries and of the keys each document has.

        The queries are the last of the ``keys`` first positions. A document may end before them, and have none.
        """
        before, found = keys - queries, []
        for parts in self.lengths:
            begin, share = 0, []
            for length in parts:
                end = min(begin + length, keys)
                if begin < end:
                    share.append((max(0, end - max(begin, before)), end - begin))
                begin += length
            found.append(share)
        return found

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(max(parts) for parts in self.lengths)

    @property
    def pairs(self) -> int:
        """Pairs of query and key that attention computes."""
        return sum(n * (n + 1) // 2 for parts in self.lengths for n in parts)
