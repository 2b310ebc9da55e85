"""The normalizer of a fast tokenizer does to a text what sentencepiece's own does."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from megatron_sgt.data.hard_texts import HARD_TEXTS
from megatron_sgt.data.sentencepiece_model import SPACE, read_pieces
from megatron_sgt.errors import DataError
from megatron_sgt.export.hf.sentencepiece_normalizer import normalizer
from tests.helpers.sentencepieces import EXTRA, SYMBOLS, train

TEXTS = [
    *HARD_TEXTS,
    "e\u0301\u0323 e\u0323\u0301 か\u3099 ｶﾞ \u1112\u1161\u11ab 한\u11ab ﬁ\u0301 ① \ua7f3 ～",
    "line\r\nand\rmore\n\x0c\x0b \x00\x01\x7f", "\x00", "\r\n", "\n", "\u00a0a\u3000 b ", "🇩🇪\u0301👩\u200d🚀",
    "  a   b \t\n c  ", "[MASK]\u0301[MASK ] Ａ", "",
]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {**EXTRA, "normalization_rule_name": "nmt_nfkc_cf", "user_defined_symbols": [*SYMBOLS, "Å"]},
        EXTRA,
        {**EXTRA, "user_defined_symbols": ["   ", "<a>"]},
        {"rules": {"ab": "x", "b": "ab"}},
    ],
    ids=["nmt_nfkc_cf, symbols", "extra spaces", "symbol of spaces", "rules"],
)
def test_as_sentencepiece_normalises(options: dict[str, object], tmp_path: Path) -> None:
    path = train(tmp_path / "m.model", **options)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = normalizer(read_pieces(path))
    for text in TEXTS:
        assert ours.normalize_str(text) == theirs.normalize(text), ascii(text)


def test_symbols_are_not_rewritten(tmp_path: Path) -> None:
    path = train(tmp_path / "m.model", rules={"M": "m", "\n": " ", "é": "e"}, user_defined_symbols=SYMBOLS)
    assert normalizer(read_pieces(path)).normalize_str("[MASK] [M]\né É") == f"[MASK]{SPACE}[m]\né{SPACE}É"


def test_too_many_rules_of_their_own(tmp_path: Path) -> None:
    rules = {f"{a}{b}": "xy" for a in "abcdefghijklmnop" for b in "abcdefghijklmnop"}
    with pytest.raises(DataError, match="too many of its rules of normalisation have no fast form"):
        normalizer(read_pieces(train(tmp_path / "m.model", rules=rules)))
