"""How many UTF-8 bytes of text tokens stand for, each on its own, so that samples may begin and end anywhere.

Decoding a sample as a whole would lose the space before its first word, and would count a character that its first or
last tokens cut in two as the sign for damaged text.
"""

from __future__ import annotations

import re

import numpy as np
from torch import Tensor

from megatron_sgt.data.tokenizer import Tokenizer

_DAMAGED = "\ufffd"
_ONE_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class TextBytes:
    """Counts for one tokenizer. The sum over a document is the length of its decoded text.

    The tokens that begin and end a document are no text: 0 bytes. What a token says of the space before it counts: the
    word " the" has 4 bytes, at the beginning of a document 3 where the tokenizer has put the space there.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._boundaries = tokenizer.boundaries
        self._before = tokenizer.encode("a")[-1:]
        """A token of known text, after which others do not stand at a beginning."""
        self._inside: dict[int, int] = {}
        self._at_beginning: dict[int, int] = {}

    def count(self, previous: int, ids: list[int]) -> int:
        """Bytes of ``ids``, the first of which comes after the token ``previous``."""
        total = 0
        for token in ids:
            total += self._of_token(token, previous in self._boundaries)
            previous = token
        return total

    def count_labels(self, tokens: Tensor, labels: Tensor, mask: Tensor) -> int:
        """Bytes of the ``labels`` that are predicted from ``tokens``, where ``mask`` is 1; all [B, S]."""
        counted = mask.numpy() != 0
        before = np.isin(tokens.numpy()[counted], list(self._boundaries))
        ids = labels.numpy()[counted]
        total = 0
        for begins in (False, True):
            different, times = np.unique(ids[before == begins], return_counts=True)
            pairs = zip(different.tolist(), times.tolist(), strict=True)
            total += sum(self._of_token(token, begins) * number for token, number in pairs)
        return total

    def _of_token(self, token: int, begins: bool) -> int:
        """``begins``: it is the first of its document."""
        if token in self._boundaries:
            return 0
        known = self._at_beginning if begins else self._inside
        if token not in known:
            known[token] = self._bytes(token, [] if begins else self._before)
        return known[token]

    def _bytes(self, token: int, before: list[int]) -> int:
        text = self._tokenizer.decode([*before, token])
        piece = self._tokenizer.piece(token)
        if _DAMAGED not in text or _DAMAGED in piece:  # a vocabulary may have the sign itself
            return len(text.encode()) - len(self._tokenizer.decode(before).encode())
        # A part of a character.
        return 1 if _ONE_BYTE.fullmatch(piece) else len(piece)  # byte-level: each sign of the piece is a byte
