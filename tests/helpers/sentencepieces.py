"""Tiny sentencepiece models of many kinds, and texts on which they may go wrong."""

from __future__ import annotations

import inspect
import io
import random
import textwrap
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_sgt.data.hard_texts import HARD_TEXTS
from megatron_sgt.data.sentencepiece_model import CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Pieces

OURS: dict[str, Any] = {
    "model_type": "bpe", "vocab_size": 700, "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True,
    "split_digits": True, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "character_coverage": 0.9995,
    "num_threads": 1, "minloglevel": 2,
}  # fmt: skip
"""As tools/train_tokenizer.py trains."""
SYMBOLS = ["<|user|>", "<|end|>", "<|", "ab", "abc", "bcd", "\n", "▁▁", "▁▁▁▁", "[MASK]", "é", "re", "<eod>"]
RULES = {"a b": "c", "A": "a", "\t": " ", "\n": " ", "\u201c": '"', "\x07": "", "re": "er", "er": "ra", "é": "e"}
PREFIX = {"add_dummy_prefix": True}
EXTRA = {"add_dummy_prefix": True, "remove_extra_whitespaces": True}
NMT = {"normalization_rule_name": "nmt_nfkc"}
UNIGRAM: dict[str, Any] = {"model_type": "unigram", "vocab_size": 500}
DEFINED: dict[str, Any] = {"user_defined_symbols": SYMBOLS}

KINDS: dict[str, dict[str, Any]] = {
    "ours": {},
    "unigram": UNIGRAM,
    "llama 2": PREFIX,
    "symbols": DEFINED,
    "symbols, prefix": {**DEFINED, **PREFIX},
    "symbols, no bytes": {**DEFINED, **PREFIX, "byte_fallback": False},
    "symbols, unigram": {**DEFINED, **PREFIX, **UNIGRAM, "vocab_size": 600},
    "symbols, extra spaces": {**DEFINED, **EXTRA},
    "symbols of spaces": {"user_defined_symbols": ["<sep>", "[MASK]", "  ", "\n", "     "], **EXTRA},
    "extra spaces": EXTRA,
    "extra spaces, no prefix": {"remove_extra_whitespaces": True},
    "suffix": {**PREFIX, "treat_whitespace_as_suffix": True},
    "suffix, extra spaces": {**EXTRA, "treat_whitespace_as_suffix": True},
    "suffix, unigram": {**PREFIX, **UNIGRAM, "treat_whitespace_as_suffix": True},
    "nmt_nfkc, no bytes": {**NMT, **EXTRA, "byte_fallback": False},
    "nmt_nfkc, all spaces": {**NMT, **PREFIX},
    "nmt_nfkc, unigram": {**NMT, **EXTRA, **UNIGRAM},
    "nmt_nfkc_cf, symbols": {**PREFIX, "normalization_rule_name": "nmt_nfkc_cf",
                             "user_defined_symbols": [*SYMBOLS, "<EOD>", "Å"]},
    "nfkc": {"normalization_rule_name": "nfkc"},
    "nfkc_cf, extra spaces": {"normalization_rule_name": "nfkc_cf", "remove_extra_whitespaces": True},
    "characters": {**PREFIX, "model_type": "char", "vocab_size": 400},
    "characters, symbols": {**DEFINED, **EXTRA, "model_type": "char", "vocab_size": 410},
    "characters, no bytes": {"model_type": "char", "vocab_size": 120, "byte_fallback": False},
    "other ids": {"unk_id": 5, "bos_id": -1, "eos_id": 3, "pad_id": 0, "control_symbols": ["[CLS]", "<0>", " x"],
                  "unk_surface": " ?? ", "byte_fallback": False, "vocab_size": 500},
    "other names": {"unk_id": 2, "bos_id": 0, "eos_id": -1, "pad_id": 1, "unk_piece": "<|unk|>", "bos_piece": "[BOS]",
                    "pad_piece": "[PAD]", "vocab_size": 600},
    "rules": {**PREFIX, "rules": RULES},
    "rules, symbols": {**DEFINED, "rules": RULES},
}  # fmt: skip
"""Options on top of OURS, by name; all have a fast form."""

UNLIKE_ANY: dict[str, Any] = {"model_type": "char", "vocab_size": 360, "control_symbols": ["Ω"], "byte_fallback": False}
"""No tokenizer of transformers is like it; with ``byte_fallback`` a slow one is."""


def train(path: Path, **options: Any) -> Path:
    """A model like those of tools/train_tokenizer.py with ``options`` of sentencepiece on top, at ``path``.

    ``rules``: of normalisation, as a mapping.
    """
    settings = {**OURS, **options}
    if rules := settings.pop("rules", None):
        table = path.with_suffix(".tsv")
        table.write_text("".join(f"{_codes(text)}\t{_codes(result)}\n" for text, result in rules.items()))
        settings |= {"normalization_rule_tsv": str(table)}
        del settings["normalization_rule_name"]
    lines = [line for module in (inspect, textwrap) for line in inspect.getsource(module).splitlines()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *HARD_TEXTS[6:8] * 20]), model_writer=model, **settings
    )
    path.write_bytes(model.getvalue())
    return path


def _codes(text: str) -> str:
    return " ".join(f"{ord(character):X}" for character in text)


CHARACTERS = (
    "ab c  \n\t=-_.01()eé北😀▁AÅ\u212b①ﬁ\u00a0\u200b\u3000\u0301\u0323\u0327\u3099かｶﾞ\r\x00\x07\x7f\x1f안녕"
    "\u1112\u1161\u11abनम\u094d👩\u200d🚀🇩🇪\u0651\u064e\u2028～ſẛ"
)


def texts_for(model: Pieces, count: int) -> list[str]:
    """The hard texts, special cases, and ``count`` random mixtures of what the model knows and what it does not."""
    rng = random.Random(0)
    special = [*model.texts(CONTROL, UNKNOWN, USER_DEFINED), "<0x0A>", "<0xE9>", "<s>", "</s>", "<unk>"]
    words = [text.replace(SPACE, " ") for text in model.texts(NORMAL) if len(text) > 1] or ["x"]
    spaces = [" ", "  ", "   ", "     ", "\n", "\t"]
    texts = [*HARD_TEXTS, "a", " ", "  ", "\n", "\r\n", "▁", "▁▁", "x▁", " ▁ x", "\x00", "\x00 x", *special]
    texts += [f"x{sign * n}y" for sign in " =-#a\n" for n in range(40)]
    for number in range(count):
        parts = []
        for _ in range(rng.randint(1, 12)):
            noise = "".join(rng.choices(CHARACTERS, k=rng.randint(1, 4)))
            of_words = [rng.choice(special), rng.choice(words), rng.choice(spaces), noise]
            parts.append(rng.choice(CHARACTERS) if number % 4 == 0 else rng.choice(of_words))
        texts.append("".join(parts))
    return texts
