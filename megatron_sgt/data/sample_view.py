"""A sample as the model sees it: its documents, and what of them it attends to and learns from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

from torch import Tensor

from megatron_sgt.data.listing import counted
from megatron_sgt.data.tokenizer import Tokenizer

_SHOWN = 240
"""Characters of a document in a line: its beginning and its end."""


@dataclass(frozen=True)
class Segment:
    """The tokens number ``first`` .. ``last`` of a sample, a document or a part of it, or padding.

    ``positions``: of the first and the last token. ``attends_from``: the first token that they attend to.
    ``not_counted``: the tokens whose labels count for nothing in the loss, for padding none is listed.
    ``text``: None without a tokenizer.
    """

    first: int
    last: int
    padding: bool
    positions: tuple[int, int]
    attends_from: int
    not_counted: tuple[int, ...]
    ids: tuple[int, ...]
    text: str | None

    def line(self, width: int) -> str:
        """For a person; ``width``: digits of a place."""
        shown = " ".join(map(str, self.ids)) if self.text is None else json.dumps(self.text, ensure_ascii=False)
        if len(shown) > _SHOWN:
            shown = f"{shown[: _SHOWN - _SHOWN // 3]} ... {shown[-(_SHOWN // 3) :]}"
        place = f"[{self.first:>{width}} .. {self.last:>{width}}]"
        if self.padding:
            return f"  {place}  padding"
        masked = f" · not predicted after {', '.join(map(str, self.not_counted))}" if self.not_counted else ""
        return (
            f"  {place}  positions {self.positions[0]} .. {self.positions[1]} · attends from {self.attends_from}"
            f"{masked}\n      {shown}"
        )


@dataclass(frozen=True)
class SampleView:
    """Sample number ``index`` of a split, in the order of the run."""

    index: int
    segments: tuple[Segment, ...]

    def lines(self) -> Iterator[str]:
        """For a person."""
        size = self.segments[-1].last + 1
        padding = sum(part.last - part.first + 1 for part in self.segments if part.padding)
        masked = sum(len(part.not_counted) for part in self.segments)
        documents = counted(sum(not part.padding for part in self.segments), "document")
        yield (
            f"sample {self.index:,}: {size - padding:,} tokens in {documents}, {padding:,} of padding; "
            f"{size - padding - masked:,} labels count"
        )
        for part in self.segments:
            yield part.line(len(str(size)))


def segments(sample: dict[str, Tensor], masked: bool, tokenizer: Tokenizer | None) -> tuple[Segment, ...]:
    """The documents of ``sample``; all of it is one where it does not tell them. ``masked``: attention stays inside."""
    ids, positions = sample["tokens"].tolist(), sample["position_ids"].tolist()
    weights = sample["loss_mask"].tolist()
    starts = sample["document_starts"].tolist() if "document_starts" in sample else [0] * len(ids)
    real = int(sample.get("num_tokens", len(ids)))
    borders = [*sorted(set(starts)), len(ids)]
    return tuple(
        Segment(
            first,
            stop - 1,
            padding=first >= real,
            positions=(positions[first], positions[stop - 1]),
            attends_from=first if masked else 0,
            not_counted=tuple(i for i in range(first, stop) if not weights[i] and i < real),
            ids=tuple(ids[first:stop]),
            text=None if tokenizer is None else readable(ids[first:stop], tokenizer),
        )
        for first, stop in pairwise(borders)
    )


def readable(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of ``ids``, the tokens that begin and end documents spelt as in the vocabulary."""
    return "".join(
        "".join(map(tokenizer.piece, run)) if boundary else tokenizer.decode(list(run))
        for boundary, run in groupby(ids, key=tokenizer.boundaries.__contains__)
    )
