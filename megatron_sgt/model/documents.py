"""What a micro-batch tells the layers of its documents, and what the settings make of it.

A ``DocumentMask`` travels through Megatron-Core in the place of the attention mask: with the call, so that a layer that
computes its activations again, or meets another micro-batch before, sees its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sgt.config import Config
from megatron_sgt.data.document_samples import DOCUMENT_KEYS
from megatron_sgt.data.pieces import cut
from megatron_sgt.errors import DataError
from megatron_sgt.ops.documents import Documents
from megatron_sgt.parallel.packed_copy import on_device


@dataclass(frozen=True, eq=False)
class DocumentMask:
    """The documents of the sequences of a micro-batch [B, S]; tensors are on its device.

    Attributes:
        attention: those that no token looks out of; None: every token sees all before it.
        positions: those in which rotary positions begin at 0; None: they do in every sequence.
        counted: the sequences whose entropy counts: their last token sees at least ``fewest`` tokens.
        fewest: see ``DocumentRules``.
    """

    attention: Documents | None
    positions: Documents | None
    counted: int
    fewest: int = 2


def document_mask(attention_mask: object | None) -> DocumentMask | None:
    """What Megatron-Core was given as its attention mask.

    Raises:
        ValueError: it is another mask, which attention here would ignore.
    """
    if attention_mask is None or isinstance(attention_mask, DocumentMask):
        return attention_mask
    raise ValueError(
        f"an attention mask of type {type(attention_mask).__name__} would be ignored: attention is causal, within "
        "documents where a DocumentMask says so"
    )


def counted(inputs: Mapping[str, Any]) -> dict[str, int]:
    """The weight of a micro-batch with ``inputs`` in ``EntropyMeter.end_micro_batch``, if it is not that of all."""
    mask: DocumentMask | None = inputs.get("documents")
    return {} if mask is None else {"weight": mask.counted}


@dataclass(frozen=True)
class DocumentRules:
    """What a configuration makes of documents.

    Attributes:
        told: whether samples say where their documents begin.
        attention: no token looks into another document. positions: rotary positions begin at 0 in each.
        weighted: losses are masked unevenly, so that a step's is the mean over all its tokens.
        fewest: tokens of a document below which its entropy counts for nothing.
        dataset: ``data.dataset``, for messages.
    """

    told: bool = False
    attention: bool = False
    positions: bool = False
    weighted: bool = False
    fewest: int = 2
    dataset: str = "indexed"

    @classmethod
    def of(cls, config: Config) -> DocumentRules:
        data = config.data
        return cls(
            told=data.tells_documents,
            attention=data.reset_attention_mask,
            positions=data.reset_position_ids,
            weighted=data.masks_loss,
            fewest=config.growth.entropy_min_document_tokens,
            dataset=data.dataset,
        )

    def mask_of(self, batch: Mapping[str, Tensor], pieces: int, device: torch.device) -> DocumentMask | None:
        """The mask of a micro-batch on the host, whose samples are cut into ``pieces``; None without documents.

        Raises:
            DataError: the samples do not say where documents begin although they should, say so unasked, or say what
                cannot be.
        """
        if not self.told:
            if given := [name for name in DOCUMENT_KEYS if name in batch]:
                raise DataError(
                    f"the samples of data.dataset {self.dataset} have {given[0]}, which nothing would obey; set "
                    "data.reset_attention_mask or data.reset_position_ids, or make samples without"
                )
            return None
        if missing := [name for name in DOCUMENT_KEYS if name not in batch]:
            raise DataError(
                f"the samples of data.dataset {self.dataset} have no {missing[0]}: data.reset_attention_mask and "
                "data.reset_position_ids need to know where documents begin; turn them off, or make samples with it"
            )
        told = {name: batch[name].cpu() for name in DOCUMENT_KEYS}
        self._check(told["document_starts"], told["num_tokens"])
        starts, tokens = cut(told, pieces).values()
        return on_device(self._mask(starts, tokens), device)

    def _check(self, starts: Tensor, tokens: Tensor) -> None:
        """Some ways of attending read the first token of each document, some the start of each token: both agree."""
        place = torch.arange(starts.shape[1], dtype=starts.dtype)
        begins = torch.where(starts == place, place, 0).cummax(1).values
        if not torch.equal(begins, starts):
            row, column = (begins != starts).nonzero()[0].tolist()
            raise DataError(
                f"the samples of data.dataset {self.dataset} say that the document of token {column} begins at "
                f"{int(starts[row, column])}, where by the tokens before it none, or another one, begins; "
                "document_starts is the position of the first token of each token's document, the same for all of them"
            )
        if not ((tokens >= 0) & (tokens <= starts.shape[1])).all():
            raise DataError(
                f"the samples of data.dataset {self.dataset} have num_tokens {tokens.tolist()}, not from 0 to their "
                f"{starts.shape[1]} tokens; it is the number of tokens before the padding"
            )

    def _mask(self, starts: Tensor, tokens: Tensor) -> DocumentMask:
        """On the host, from starts [B, S] and the number of tokens [B] before the padding."""
        told = Documents.of(starts, tokens) if self.attention or self.positions else None
        positions, attention = (told if wanted else None for wanted in (self.positions, self.attention))
        if not self.attention:  # all tokens are one document, and the padding another
            place = torch.arange(starts.shape[1], dtype=starts.dtype)
            starts = torch.where(place < tokens[:, None], 0, tokens[:, None]).to(starts.dtype)
            attention = Documents.of(starts, tokens)
        seen = tokens - starts.gather(1, (tokens.long() - 1).clamp(min=0)[:, None])[:, 0]
        counted = int(((tokens > 0) & (seen >= self.fewest)).sum())
        return DocumentMask(attention, positions, counted, self.fewest)
