"""Collects attention entropies over the micro-batches of one optimizer step.

Values are *stored* per micro-batch and added once when the micro-batch ends. A layer that recomputes its
activations in the backward pass stores the same value a second time, and nothing is counted twice.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.parallel.head_layout import HeadLayout


class EntropyMeter:
    """Entropy table [L, P, N] of this rank's heads, fp32, on the rank's device.

    While ``enabled`` is False nothing is measured and nothing is communicated.
    """

    def __init__(self, num_layers: int, num_passes: int, layout: HeadLayout, device: torch.device) -> None:
        self.layout = layout
        self.enabled = False
        shape = (num_layers, num_passes, layout.heads_per_rank)
        self._current = torch.zeros(shape, dtype=torch.float32, device=device)
        self._sum = torch.zeros_like(self._current)
        self._micro_batches = 0

    def store(self, layer: int, attention_pass: int, heads: Tensor | slice, entropy: Tensor) -> None:
        """Keep ``entropy`` ([number of heads]) of one pass of one layer for the running micro-batch."""
        self._current[layer, attention_pass, heads] = entropy

    def end_micro_batch(self) -> None:
        """Add the running micro-batch to the step's sum."""
        if self.enabled:
            self._sum += self._current
            self._micro_batches += 1

    def reset(self) -> None:
        """Forget the step so far."""
        self._current.zero_()
        self._sum.zero_()
        self._micro_batches = 0

    def reduce(self, groups: ParallelGroups) -> np.ndarray:
        """Mean over micro-batches and data-parallel ranks, all heads of the model; then reset.

        One all-reduce over all ranks: each tensor-parallel rank contributes its own heads' columns.

        Returns:
            [L, P, N of the whole model] float64 on the host; passes that no layer executed are 0.
        """
        layers, passes, _ = self._sum.shape
        table = self._sum.new_zeros((layers, passes, self.layout.num_heads))
        owned = self.layout.owned_heads
        table[:, :, owned.start : owned.stop] = self._sum
        if groups.world_size > 1:
            dist.all_reduce(table)
        table /= max(1, self._micro_batches) * groups.dp_size
        self.reset()
        return table.double().cpu().numpy()
