"""A sentencepiece model as a tokenizer of Hugging Face's tokenizers library, with the same ids.

sentencepiece's BPE joins, again and again, the neighbouring pieces whose union has the highest score (of equals the
leftmost); the library's BPE joins by the rank of the pair. Every split of a piece into two pieces is a pair, ranked by
the piece's score: the ids are the same. A character model is one without pairs. User-defined symbols are cut out
before, and are then pieces as they are. Its unigram model is the same search for the likeliest segmentation in both
libraries, user-defined symbols by a high score, but sentencepiece adds the scores in single precision: where two
segmentations are equally likely ("=====" as "====" "=" or "=" "===="), they may take different ones.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from megatron_sgt.data.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNIGRAM,
    UNKNOWN,
    USER_DEFINED,
    Pieces,
)
from megatron_sgt.errors import DataError
from megatron_sgt.export.hf.charsmap import alternation
from megatron_sgt.export.hf.sentencepiece_normalizer import MARK, normalizer

_NEVER = -1e6
_PER_BYTE = 1e4
"""More than the scores of the pieces of one special token come to."""


def fast_tokenizer(path: Path, model: Pieces) -> FastTokenizer:
    """The equivalent fast tokenizer of the model file.

    Raises:
        DataError: there is none.
    """
    fast = _unigram(model) if model.kind == UNIGRAM else _bpe(path, model)
    fast.normalizer = normalizer(model)
    fast.decoder = _decoder(model)
    special = [AddedToken(text, normalized=False, special=True)
               for text, _, kind in model.pieces if kind in (UNKNOWN, CONTROL)]  # fmt: skip
    fast.add_special_tokens(special)
    return fast


def _unigram(model: Pieces) -> FastTokenizer:
    """Special tokens and bytes written out in a text must not look like pieces: their score is too low.

    An unknown character scores lower than any piece. Where such a text has one, every byte gets so much more that the
    many pieces and unknown characters of the text win against the one piece; all other sums differ by a constant.
    """
    per_byte = 0.0 if model.spells_special_tokens else _PER_BYTE
    symbols = set(model.user_defined)

    def scored(text: str, score: float, kind: int) -> float:
        size = len(text.encode())
        if text in symbols and kind == USER_DEFINED:  # as in sentencepiece's search
            score = 0.1 * (size - 1)
        elif kind != NORMAL:
            score = -per_byte if per_byte else _NEVER
        return score + per_byte * size

    vocabulary = [(piece[0], scored(*piece)) for piece in model.pieces]
    return FastTokenizer(models.Unigram(vocabulary, unk_id=model.unk, byte_fallback=model.byte_fallback))


def _bpe(path: Path, model: Pieces) -> FastTokenizer:
    vocabulary = {text: index for index, (text, _, _) in enumerate(model.pieces)}
    merges = _merges(model) if model.kind == BPE else []
    options: dict[str, Any] = {"unk_token": model.pieces[model.unk][0], "fuse_unk": True}
    symbols = model.user_defined
    if symbols:  # a piece as it is, where it stands alone
        options["ignore_merges"] = True
    fast = FastTokenizer(models.BPE(vocabulary, merges, byte_fallback=model.byte_fallback, **options))
    if symbols:
        cuts = [pre_tokenizers.Split(Regex(alternation(symbols)), "isolated")]
        if (apart := _apart(path, model, set(symbols))) is not None:
            cuts.append(pre_tokenizers.Split(Regex(apart), "removed"))
        fast.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    return fast


def _apart(path: Path, model: Pieces, symbols: set[str]) -> str | None:
    """Where to cut a text that looks like one piece, and is not for sentencepiece: a regular expression.

    Special tokens and bytes written out, and pieces that no joining leads to.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    bare: Any = sentencepiece_model_pb2.ModelProto()
    bare.ParseFromString(path.read_bytes())
    rules = bare.normalizer_spec
    rules.precompiled_charsmap, rules.add_dummy_prefix = b"", False
    rules.remove_extra_whitespaces, rules.escape_whitespaces = False, False
    processor = sentencepiece.SentencePieceProcessor(model_proto=bare.SerializeToString())
    texts = [text for text, _, _ in model.pieces if len(text) > 1 and text not in symbols]
    cut: dict[str, list[str]] = {}
    for text, ids in zip(texts, processor.encode(texts), strict=True):
        if len(ids) == 1 and model.pieces[ids[0]][0] == text:
            continue
        first = processor.encode(text, out_type=str)[0]
        head = text[0] if model.pieces[ids[0]][2] == BYTE else first
        if head == text:
            raise DataError(f"it does not know its piece {text!r}")
        cut.setdefault(head, []).append(text[len(head) :])
    if not cut:
        return None
    places = (rf"{re.escape(head)}\K(?={alternation(tails)}\z)" for head, tails in cut.items())
    return rf"\A(?:{'|'.join(places)})"


def _decoder(model: Pieces) -> decoders.Decoder:
    steps: list[decoders.Decoder] = []
    if not model.byte_fallback:
        steps.append(decoders.Replace(Regex(rf"\A{re.escape(model.pieces[model.unk][0])}\z"), MARK))
    steps += [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    runs = any(text.startswith(2 * SPACE) for text, _, _ in model.pieces)
    if model.escape_whitespaces and (model.remove_extra_whitespaces or model.add_dummy_prefix):
        all_of_them = model.remove_extra_whitespaces and not runs
        steps.append(decoders.Replace(Regex(r"\A +"), "") if all_of_them else decoders.Strip(" ", 1, 0))
    if not model.byte_fallback:
        steps.append(decoders.Replace(MARK, model.unknown_surface))
    return decoders.Sequence(steps)


def _merges(model: Pieces) -> list[tuple[str, str]]:
    scores = {text: score for text, score, kind in model.pieces if kind == NORMAL}
    order = {text: index for index, text in enumerate(scores)}
    ranked = []
    for text, score in scores.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                ranked.append((-score, order[text], order[left], order[right], (left, right)))
    return [pair for *_, pair in sorted(ranked)]
