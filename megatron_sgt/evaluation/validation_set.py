"""A set of samples that a run validates on: what one validation of it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgt.data.loader import EvalLoader
from megatron_sgt.evaluation.perplexity import bits_per_byte, mean_loss, perplexity
from megatron_sgt.evaluation.text_bytes import TextBytes
from megatron_sgt.parallel.groups import ParallelGroups

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Validated:
    """Mean over all predicted tokens of the set; ``bits_per_byte``: None without a tokenizer."""

    loss: float
    bits_per_byte: float | None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    def fields(self, prefix: str = "") -> dict[str, float]:
        """For the metrics, under names that begin with ``prefix``."""
        found = {f"{prefix}loss": self.loss, f"{prefix}perplexity": self.perplexity}
        if self.bits_per_byte is not None:
            found[f"{prefix}bits_per_byte"] = self.bits_per_byte
        return found


class ValidationSet:
    """Every validation reads the same micro-batches; the first one counts their tokens and bytes.

    Args:
        name: in data.valid; None: the validation split.
        samples, size: how many samples one validation reads, of how many.
        counter: of the data's tokenizer; None without one.
        alive: called for every micro-batch: a long validation is no hang.
    """

    def __init__(
        self,
        name: str | None,
        batches: EvalLoader,
        samples: int,
        size: int,
        groups: ParallelGroups,
        counter: TextBytes | None = None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.samples = samples
        self.size = size
        self._batches = batches
        self._groups = groups
        self._counter = counter
        self._alive = alive
        self._extent: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Micro-batches of this rank."""
        return len(self._batches)

    @property
    def tokens(self) -> int:
        """Predicted tokens of all ranks; 0 before the first validation."""
        return self._extent[0] if self._extent is not None else 0

    def measure(self, model: torch.nn.Module) -> Validated:
        """Validate ``model``; collective."""
        found = [0, 0]
        loss = mean_loss(model, self._counted(found) if self._extent is None else self._watched(), self._groups)
        if self._extent is None:
            self._extent = self._of_all_ranks(found)
        tokens, text_bytes = self._extent
        return Validated(loss, None if self._counter is None else bits_per_byte(loss, tokens, text_bytes))

    def _watched(self) -> Iterator[Batch]:
        for batch in self._batches:
            self._alive()
            yield batch

    def _counted(self, found: list[int]) -> Iterator[Batch]:
        """``found`` grows by the tokens and bytes of this rank."""
        for batch in self._watched():
            mask = batch["loss_mask"]
            found[0] += int(mask.sum(dtype=torch.float64))
            if self._counter is not None:
                found[1] += self._counter.count_labels(batch["tokens"], batch["labels"], mask)
            yield batch

    def _of_all_ranks(self, found: list[int]) -> tuple[int, int]:
        total = torch.tensor(found, dtype=torch.int64, device=self._groups.device)
        if self._groups.dp_size > 1:
            dist.all_reduce(total, group=self._groups.dp_group)
        tokens, text_bytes = total.tolist()
        return tokens, text_bytes
