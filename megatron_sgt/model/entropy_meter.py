"""Collects attention entropies over the micro-batches of one optimizer step.

Values are *stored* in the forward pass of a micro-batch and added when that has ended: in a pipeline the next
micro-batch comes before the backward pass of this one. A layer that recomputes its activations in the backward pass
measures again; while the meter is ``paused`` nothing is stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.errors import ConfigError
from megatron_sgt.parallel.groups import ParallelGroups


class EntropyMeter:
    """Entropy table [L, P, heads of the whole model], fp32, on the rank's device.

    A rank fills in what it measured and leaves 0 elsewhere: its own heads as a rule, all kept heads where looping is
    balanced and it holds the last token. While ``enabled`` is False nothing is measured and nothing is communicated.

    Args (beyond the sizes):
        weighted: what is stored are sums over the sequences that count, which samples with documents may make differ
            between micro-batches, and not means.
    """

    def __init__(
        self, num_layers: int, num_passes: int, layout: HeadLayout, device: torch.device, weighted: bool = False
    ) -> None:
        self.layout = layout
        self.enabled = False
        self.weighted = weighted
        shape = (num_layers, num_passes, layout.num_heads)
        self._current = torch.zeros(shape, dtype=torch.float32, device=device)
        self._sum = torch.zeros_like(self._current)
        self._weight = 0  # micro-batches, or sequences
        self._paused = False

    @property
    def device(self) -> torch.device:
        return self._current.device

    def store(self, layer: int, attention_pass: int, entropy: Tensor, heads: Tensor | None = None) -> None:
        """Keep the entropies of one pass of one layer for the running micro-batch.

        Args:
            entropy: [number of heads].
            heads: global ids of those heads; None: this rank's own heads.
        """
        if self._paused:
            return
        if heads is None:
            owned = self.layout.owned_heads
            self._current[layer, attention_pass, owned.start : owned.stop] = entropy
        else:
            self._current[layer, attention_pass, heads] = entropy

    def is_finite(self) -> Tensor:
        """Whether all that was stored for the running micro-batch is finite: a bool scalar on the device."""
        return self._current.isfinite().all()

    def end_micro_batch(self, whole: bool = True, weight: int = 1) -> None:
        """Add what was stored in a forward pass.

        Args:
            whole: the micro-batch has passed all this rank's layers.
            weight: of the micro-batch; where sums are stored, the sequences that count.
        """
        if self.enabled:
            self._sum += self._current
            self._current.zero_()
            self._weight += whole * weight

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Store nothing in the body, a backward pass. Layers measure as ever: recomputed work must be the same."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def reset(self) -> None:
        self._current.zero_()
        self._sum.zero_()
        self._weight = 0

    def reduce(self, groups: ParallelGroups) -> np.ndarray | None:
        """Mean over micro-batches (``weighted``: sequences) and data-parallel ranks of all heads; then reset.

        One all-reduce over all ranks: every entry was measured by one rank of each tensor-parallel group, or of each
        sequence by one. All ranks of such a group have counted the same sequences.

        Returns:
            [L, P, N of the whole model] float64 on the host; passes that no layer executed are 0. None where no
            sequence of the step counted.
        """
        table, weight = self._sum, max(1, self._weight) * groups.dp_size
        if self.weighted:
            table = torch.cat([table.flatten(), table.new_full((1,), self._weight)])
        if groups.world_size > 1:
            dist.all_reduce(table)
        values = table.double().cpu().numpy()
        if self.weighted:
            weight = round(values[-1]) // (groups.tp_size * groups.pp_size)
            values = values[:-1].reshape(self._sum.shape)
        self.reset()
        return values / weight if weight else None


def refuse_unmeasured(step: int) -> None:
    """Refuse to decide from averages into which nothing has entered.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"growth.entropy_min_document_tokens: a decision is due after step {step}, and no sequence has ended in a "
        "document as long as this so far, so that nothing was measured; lower it"
    )
