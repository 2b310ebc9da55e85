"""A sentencepiece model as a tokenizer of Hugging Face's tokenizers library, with the same ids.

sentencepiece's BPE joins, again and again, the neighbouring pieces whose union has the highest score (of equals the
leftmost); the library's BPE joins by the rank of the pair. Every split of a piece into two pieces is a pair, ranked by
the piece's score: the ids are the same. Its unigram model is the same search for the likeliest segmentation in both
libraries, but sentencepiece adds the scores in single precision: where two segmentations are equally likely
("=====" as "====" "=" or "=" "===="), they may take different ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, decoders, normalizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE, Unigram

from megatron_sgt.errors import DataError

SPACE = "\u2581"
"""What sentencepiece writes for a space."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_UNIGRAM, _BPE = 1, 2
_NEVER = -1e6
TIE = 1e-3
"""Difference of log-likelihoods that counts as none: single precision, summed over a text."""


@dataclass(frozen=True)
class Pieces:
    """What a sentencepiece model file says. ``pieces``: (text, score, kind) by id; ids are None where unset."""

    pieces: tuple[tuple[str, float, int], ...]
    kind: int
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: bytes
    bos: int | None
    eos: int | None
    unk: int
    pad: int | None

    def special(self, index: int | None) -> str | None:
        return None if index is None else self.pieces[index][0]

    def same_segmentation(self, one: list[int], other: list[int]) -> bool:
        """Whether two encodings of a text are the same, or equally likely under a unigram model."""
        if self.kind == _BPE or one == other:
            return one == other
        likelihoods = [sum(self.pieces[index][1] for index in ids) for ids in (one, other)]
        return abs(likelihoods[0] - likelihoods[1]) < TIE

    @property
    def pad_or_stand_in(self) -> int | None:
        """The padding token; without one, unknown where no text can produce it, else the end of a text."""
        return self.pad if self.pad is not None else self.unk if self.byte_fallback else self.eos


def read_pieces(path: Path) -> Pieces:
    """Read a model file.

    Raises:
        DataError: its kind of model has no fast form here.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise DataError(f"{path} is neither a BPE nor a unigram model: it has no fast form")
    if trainer.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise DataError(f"{path} treats white space in a way that has no fast form")
    processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    ids = [processor.bos_id(), processor.eos_id(), processor.pad_id()]
    bos, eos, pad = (index if index >= 0 else None for index in ids)
    return Pieces(
        pieces=tuple((p.piece, p.score, p.type) for p in proto.pieces),
        kind=trainer.model_type,
        byte_fallback=trainer.byte_fallback,
        add_dummy_prefix=rules.add_dummy_prefix,
        remove_extra_whitespaces=rules.remove_extra_whitespaces,
        charsmap=rules.precompiled_charsmap,
        bos=bos,
        eos=eos,
        unk=processor.unk_id(),
        pad=pad,
    )


def fast_tokenizer(model: Pieces) -> FastTokenizer:
    """The equivalent fast tokenizer."""
    if model.kind == _BPE:
        vocabulary = {text: index for index, (text, _, _) in enumerate(model.pieces)}
        unknown = model.pieces[model.unk][0]
        bpe = BPE(vocabulary, _merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)
        fast = FastTokenizer(bpe)
    else:
        # Special tokens and bytes written out in a text must not look like pieces.
        scored = [(text, score if kind in (_NORMAL, _USER_DEFINED) else _NEVER) for text, score, kind in model.pieces]
        fast = FastTokenizer(Unigram(scored, unk_id=model.unk, byte_fallback=model.byte_fallback))
    fast.normalizer = _normalizer(model)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * model.add_dummy_prefix)
    special = [AddedToken(text, normalized=False, special=True)
               for text, _, kind in model.pieces if kind in (_UNKNOWN, _CONTROL)]  # fmt: skip
    fast.add_special_tokens(special)
    fast.add_tokens([AddedToken(text.replace(SPACE, " "), normalized=False)
                     for text, _, kind in model.pieces if kind == _USER_DEFINED])  # fmt: skip
    return fast


def _merges(model: Pieces) -> list[tuple[str, str]]:
    scores = {text: score for text, score, kind in model.pieces if kind in (_NORMAL, _USER_DEFINED)}
    order = {text: index for index, text in enumerate(scores)}
    ranked = []
    for text, score in scores.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                ranked.append((-score, order[text], order[left], order[right], (left, right)))
    return [pair for *_, pair in sorted(ranked)]


def _normalizer(model: Pieces) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
