"""Compiled rules of normalisation are read, and many texts are found by one regular expression."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_sgt.data.sentencepiece_model import read_pieces
from megatron_sgt.export.hf.charsmap import alternation, character_class, read_charsmap
from tests.helpers.sentencepieces import RULES, train


def test_rules_of_a_model(tmp_path: Path) -> None:
    assert read_charsmap(read_pieces(train(tmp_path / "m.model", rules=RULES)).charsmap) == RULES
    assert read_charsmap(b"") == {}


def test_the_longest_of_many_texts() -> None:
    texts = ["a", "ab", "abcd", "xbcd", "[|]", "b-"]
    pattern = re.compile(re.sub(r"\\x\{(\w+)\}", lambda m: re.escape(chr(int(m[1], 16))), alternation(texts)))
    assert pattern.findall("abcabcdxbcd[|]b-ba") == ["ab", "abcd", "xbcd", "[|]", "b-", "a"]
    assert character_class("cabx") == r"[\x{61}-\x{63}\x{78}]"
    assert character_class("a") == r"\x{61}"
    assert len(alternation(a + b for a in "abcdefgh" for b in "stuvwxyz")) < 60, "equal continuations are shared"
