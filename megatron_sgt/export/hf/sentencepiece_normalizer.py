"""Sentencepiece's normalisation of a text as a normalizer of Hugging Face's tokenizers library.

Sentencepiece goes from left to right and takes at every place the longest user-defined symbol, which stays as it is,
else the longest text that a rule replaces, else one character. The library applies compiled rules (``Precompiled``) to
grapheme clusters, of which it takes the first rule that matches and drops the rest. So clusters are first broken apart
by a mark that no text holds, everywhere but inside a text with a rule of its own; such texts are composed by NFKC, and
what is left are rules for single characters. What cannot be had in this way (user-defined symbols with characters that
a rule replaces, rules of the user) is set aside as a private character.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

from tokenizers import Regex, normalizers

from megatron_sgt.data.sentencepiece_model import SPACE, USER_DEFINED, Pieces
from megatron_sgt.errors import DataError
from megatron_sgt.export.hf.charsmap import alternation, character_class, read_charsmap

MARK = "\ufff0"
"""Never assigned, invisible, and a grapheme cluster of its own."""
_ASIDE = 0x10F000
"""Private characters that stand for texts set aside."""
_MANY = 200
"""One pass over the text each."""
_NEWER_SHARE = 0.005
"""Of the rules: those with characters that this library's version of Unicode does not know yet."""
_EXTENDING = (
    r"\p{M}\p{Cf}\r\n\x{1100}-\x{11ff}\x{a960}-\x{a97f}\x{d7b0}-\x{d7ff}\x{1f1e6}-\x{1f1ff}\x{1f3fb}-\x{1f3ff}"
    r"\x{ff9e}\x{ff9f}\x{0d4e}\x{111c2}\x{111c3}\x{1193f}\x{11941}\x{11a3a}\x{11a84}-\x{11a89}\x{11d46}\x{11f02}"
)
"""Characters that may be in one cluster with the one before or after them."""
_ANY = "(?m:.)"
_BETWEEN = "\ue000\n"
"""Holds texts apart, of which none contains it."""


def normalizer(model: Pieces) -> normalizers.Normalizer:
    """The steps from a text to what the model cuts into pieces.

    Raises:
        DataError: the rules are too many of a kind that the library has not.
    """
    suffix = model.add_dummy_prefix and model.suffix
    prefix = [normalizers.Prepend(model.space)] if model.add_dummy_prefix and not suffix else []
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps += [] if model.remove_extra_whitespaces else prefix  # a text of which nothing is left has a prefix, too
        steps += _rules(model)
    if model.remove_extra_whitespaces:
        steps += [*_without_extra_spaces(model), *prefix]
    elif not model.charsmap:
        steps += prefix
    if model.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if model.remove_extra_whitespaces:
        steps.append(_replace(rf"{model.space}+\z", "") if not suffix else _replace(rf"{model.space}*\z", model.space))
    elif suffix:
        steps.append(_replace(rf"(?<={_ANY})\z", model.space))
    return normalizers.Sequence(steps)


def _replace(pattern: str, content: str) -> normalizers.Normalizer:
    return normalizers.Replace(Regex(pattern), content)


def _without_extra_spaces(model: Pieces) -> Iterator[normalizers.Normalizer]:
    """Of spaces one is left, or as many as the longest user-defined symbol of spaces that fits."""
    yield _replace(r"\A +| +\z", "")
    lengths = sorted({1, *(len(text) for text in model.texts(USER_DEFINED) if text and not text.strip(" "))})
    for left, longer in zip(lengths, [*lengths[1:], None], strict=True):
        most = "" if longer is None else str(longer - left - 1)
        if most != "0":
            yield _replace(rf"(?<! ) {{{left}}}\K {{1,{most}}}(?! )", "")


def _rules(model: Pieces) -> Iterator[normalizers.Normalizer]:
    rules = read_charsmap(model.charsmap)
    several = [text for text in rules if len(text) > 1]
    following = character_class({character for text in several for character in text[1:]}) if several else ""
    symbols = model.texts(USER_DEFINED)
    choices = [
        *([alternation(symbols)] if symbols else []),
        *([f"{_ANY}(?!{following})", alternation(several)] if several else []),
        _ANY,
    ]
    token = f"(?>{'|'.join(choices)})"
    composed, aside = _composed(rules, several)
    aside |= {text: text for text in symbols if _applied(rules, text) != text}
    if len(aside) > _MANY:
        raise DataError("too many of its rules of normalisation have no fast form")
    numbered = [(chr(_ASIDE + n), source, result) for n, (source, result) in enumerate(aside.items())]
    for private, source, _ in numbered:
        among = symbols if source in symbols else several
        longer = [text for text in among if text.startswith(source) and text != source]
        barred = f"(?!{alternation(longer)})" if longer else ""
        if source not in symbols and symbols:
            barred += f"(?!{alternation(symbols)})"
        yield _replace(rf"\G{token}*?\K{barred}{re.escape(source)}", private)
    extending = f"[{_EXTENDING}{following}]"
    breaks = rf"(?!\A|\z)(?:(?={extending})|(?<={extending}))"  # the library fails on a mark at an end
    yield _replace(rf"\G{token}+?\K{breaks}", MARK)
    if composed:
        yield normalizers.NFKC()
        yield _replace(breaks, MARK)
    if dropped := [text for text, result in rules.items() if len(text) == 1 and not result]:
        yield _replace(character_class(dropped), "")  # the library fails where the first character is dropped
    yield normalizers.Precompiled(model.charsmap)
    yield normalizers.Replace(MARK, "")
    for private, _, result in numbered:
        yield normalizers.Replace(private, result)


def _composed(rules: dict[str, str], several: list[str]) -> tuple[bool, dict[str, str]]:
    """Whether NFKC serves for the rules of ``several`` characters, and the rules that need a way of their own."""
    failing = (text for text in several if _singly(rules, text) != rules[text])
    others = {text: rules[text] for text in islice(failing, _MANY + 1)}
    if len(others) <= _MANY:
        return False, others
    forms = zip(rules.items(), _forms(rules), strict=True)
    failed = sum(_singly(rules, form) != result for (_, result), form in forms)
    if failed > _NEWER_SHARE * len(rules):
        return False, others
    # Characters that the rules leave alone, and NFKC does not; ideographs and Hangul it never changes.
    codes = (
        *range(0x3400),
        *range(0xA000, 0xAC00),
        *range(0xD7A4, 0xD800),
        *range(0xE000, 0x20000),
        *range(0x2F800, 0x30000),
    )
    every = [one for code in codes if (one := chr(code)) not in rules and one not in _BETWEEN]
    others = {one: one for one, form in zip(every, _forms(every), strict=True) if form != one}
    return True, others


def _forms(texts: Iterable[str]) -> list[str]:
    """NFKC of every text, in one go."""
    return normalizers.NFKC().normalize_str(_BETWEEN.join(texts)).split(_BETWEEN)


def _singly(rules: dict[str, str], text: str) -> str:
    return "".join(rules.get(character, character) for character in text)


def _applied(rules: dict[str, str], text: str) -> str:
    """What the rules make of ``text``."""
    result, at = "", 0
    while at < len(text):
        end = next((end for end in range(min(len(text), at + 16), at, -1) if text[at:end] in rules), None)
        result += text[at] if end is None else rules[text[at:end]]
        at = at + 1 if end is None else end
    return result
