"""Special tokens of Hugging Face's tokenizers library that are written out in a text: they are text."""

import re
from collections.abc import Iterable
from typing import Any


def read_as_text(fast: Any, boundaries: Iterable[int] = ()) -> None:
    """Make ``fast``, a ``tokenizers.Tokenizer``, cut special tokens that a text mentions as it cuts other text.

    Added tokens that are not special remain tokens, except ``boundaries``: ids that begin and end documents.

    The library does so where they are nothing but added tokens. Where they are words of the model's vocabulary, too
    (``</s>`` of a unigram model, ``[SEP]`` between spaces), the model itself would find them: these words alone are
    split behind their first character, which changes no text that does not spell them.
    """
    from tokenizers import AddedToken, Regex, pre_tokenizers

    added = fast.get_added_tokens_decoder()
    ordinary = sorted(index for index in boundaries if index not in added or not added[index].special)
    fast.add_special_tokens([AddedToken(fast.id_to_token(index), normalized=False) for index in ordinary])
    fast.encode_special_tokens = True
    words = [
        token.content
        for index, token in fast.get_added_tokens_decoder().items()
        if token.special and len(token.content) > 1 and _found(fast, index, token.content)
    ]
    if not words:
        return
    # Unigram finds them anywhere, WordPiece where a word begins, the others as whole words only.
    begins, ends = {"Unigram": ("", ""), "WordPiece": (r"\A", "")}.get(type(fast.model).__name__, (r"\A", r"\z"))
    tails: dict[str, list[str]] = {}
    for word in words:
        tails.setdefault(re.escape(word[0]), []).append(re.escape(word[1:]) + ends)
    places = (f"{begins}{head}(?={'|'.join(rest)})" for head, rest in tails.items())  # begun as the search is fastest
    split = pre_tokenizers.Split(Regex("|".join(places)), "isolated")
    before = fast.pre_tokenizer
    fast.pre_tokenizer = split if before is None else pre_tokenizers.Sequence([before, split])


def _found(fast: Any, index: int, word: str) -> bool:
    """Whether the model finds its ``word`` in a text: not where case or the cutting into words keep it apart."""
    try:
        if [token.id for token in fast.model.tokenize(word)] != [index]:
            return False
        found = [(text, fast.encode(text, add_special_tokens=False)) for text in (word, f"a {word} b", f"a{word}b")]
        places = ((text, a, b, one) for text, ids in found for one, (a, b) in zip(ids.ids, ids.offsets, strict=True))
        return any(one == index and word in text[a:b] for text, a, b, one in places)
    except Exception:  # the library's bare one: a model without an unknown token that does not know a sign of it
        return False
