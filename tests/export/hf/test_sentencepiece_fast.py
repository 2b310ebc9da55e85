"""A sentencepiece model and its fast form give the same ids, and the same text again."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer as FastTokenizer

from megatron_sgt.data.sentencepiece_model import FAST, SPACE, UNIGRAM, form_of, read_pieces
from megatron_sgt.errors import DataError
from megatron_sgt.export.hf.sentencepiece_fast import fast_tokenizer
from tests.helpers.exhaustive import share_of
from tests.helpers.sentencepieces import KINDS, PREFIX, texts_for, train

SHARE = ["ours", "unigram", "llama 2", "symbols, prefix", "symbols, no bytes", "symbols, unigram", "symbols of spaces",
         "suffix, extra spaces", "characters, symbols", "other ids", "rules, symbols"]  # fmt: skip


@pytest.mark.parametrize("kind", share_of(KINDS, SHARE))
def test_same_ids_and_same_text(kind: str, tmp_path: Path) -> None:
    compare(train(tmp_path / "m.model", **KINDS[kind]), 600)


def compare(path: Path, count: int) -> None:
    """The model at ``path`` and its fast form, on texts of which ``count`` are random."""
    slow = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = read_pieces(path)
    assert form_of(pieces) == FAST
    fast = FastTokenizer.from_str(fast_tokenizer(path, pieces).to_str())
    fast.encode_special_tokens = True
    texts = texts_for(pieces, count)
    tied = 0
    for text in texts:
        found, ids = fast.encode(text, add_special_tokens=False).ids, slow.encode(text)
        assert pieces.same_segmentation(found, ids), ascii(text)
        tied += found != ids
        assert fast.decode(ids, skip_special_tokens=False) == slow.decode(ids), ascii(text)
    assert tied == 0 or (pieces.kind == UNIGRAM and tied < 0.1 * len(texts))
    for number, (text, _, _) in enumerate(pieces.pieces):
        assert (fast.token_to_id(text), fast.id_to_token(number)) == (number, text)


def test_spaces_that_are_not_escaped(tmp_path: Path) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(train(tmp_path / "m.model", **PREFIX).read_bytes())
    model.normalizer_spec.escape_whitespaces = False
    for piece in model.pieces:
        piece.piece = piece.piece.replace(SPACE, " ")
    (tmp_path / "n.model").write_bytes(model.SerializeToString())
    compare(tmp_path / "n.model", 100)


def test_a_model_that_does_not_know_its_own_piece_has_none(tmp_path: Path) -> None:
    """A special token of unknown characters would be found between user-defined symbols."""
    options = {"byte_fallback": False, "vocab_size": 200, "control_symbols": ["ΨΩ"], "user_defined_symbols": ["<sep>"]}
    path = train(tmp_path / "m.model", **options)
    with pytest.raises(DataError, match="it does not know its piece 'ΨΩ'"):
        fast_tokenizer(path, read_pieces(path))
