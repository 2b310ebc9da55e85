"""What a sentencepiece model says, and how it will be exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.export_form import export_form
from megatron_sgt.data.sentencepiece_model import (
    BPE,
    CHAR,
    CONTROL,
    FAST,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WORD,
    Pieces,
    form_of,
    read_pieces,
)
from megatron_sgt.errors import DataError
from tests.helpers.sentencepieces import train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("sp") / "m.model", vocab_size=400)


def test_what_a_file_says(model: Path, tmp_path: Path) -> None:
    ours = read_pieces(model)
    assert (ours.bos, ours.eos, ours.unk, ours.pad, ours.pad_or_stand_in) == (1, 2, 0, None, 0)
    assert [ours.special(n) for n in (1, 2, None)] == ["<s>", "</s>", None]
    other = read_pieces(train(tmp_path / "b.model", byte_fallback=False, bos_id=-1, eos_id=1))
    assert (other.bos, other.eos, other.pad_or_stand_in) == (None, 1, 1)
    assert other.same_segmentation([1, 2], [1, 2]) and not other.same_segmentation([1, 2], [2, 1])
    assert replace(other, kind=UNIGRAM).same_segmentation([1, 9], [9, 1]), "equally likely"
    for content, problem in ((b"\xff\xff", "not a sentencepiece model; give"), (b"", "it has no unknown piece")):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(DataError, match=problem):
            read_pieces(tmp_path / "x")
    with pytest.raises(DataError, match="cannot be read"):
        read_pieces(tmp_path / "nowhere")


def test_most_are_fast(model: Path) -> None:
    form = export_form(TokenizerConfig(type="sentencepiece", model=str(model)))
    assert form == FAST and form.line is None
    assert export_form(None) == FAST


SMALL = Pieces(
    pieces=(("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), *((c, -9.0, NORMAL) for c in "abc"), ("ab", -1.0, NORMAL)),
    kind=BPE, byte_fallback=False, add_dummy_prefix=False, remove_extra_whitespaces=False, escape_whitespaces=True,
    suffix=False, charsmap=b"", own_rules=False, rewrites_decoded=False, unknown_surface=" ? ",
    bos=1, eos=None, unk=0, pad=None,
)  # fmt: skip


def but(*pieces: tuple[str, float, int], **changes: object) -> Pieces:
    return replace(SMALL, pieces=(*SMALL.pieces, *pieces), **changes)  # type: ignore[arg-type]


LETTERS = tuple((letter, -9.0, NORMAL) for letter in "<unk>s")


@pytest.mark.parametrize(
    "pieces, form, why",
    [
        (SMALL, "fast", ""),
        (but(kind=WORD), "slow", "a model of whole words"),
        (but(*LETTERS, rewrites_decoded=True), "slow", "rules for decoded text"),
        (but(*LETTERS, ("bc", 0, UNUSED)), "slow", "marked as unused"),
        (but(*LETTERS, ("az", -2, NORMAL)), "slow", "pieces of it hold 'z'"),
        (but(*LETTERS, ("bc", -1, NORMAL)), "slow", "the same score"),
        (but(*LETTERS, (" x", 0, USER_DEFINED), remove_extra_whitespaces=True), "slow", "symbol ' x'"),
        (but(*LETTERS, ("  ", 0, USER_DEFINED), remove_extra_whitespaces=True, charsmap=b"x"), "slow", ""),
        (but(("  ", 0, USER_DEFINED), remove_extra_whitespaces=True), "fast", ""),
        (but(*LETTERS, ("Z", 0, CONTROL), kind=CHAR, byte_fallback=True), "slow", "'Z' is one character"),
        (but(*LETTERS, ("Z", 0, CONTROL), kind=CHAR), "none", "the slow class takes 'Z' in a text"),
        (but(kind=UNIGRAM), "fast", ""),
        (but(("北京", 0, CONTROL), kind=UNIGRAM, byte_fallback=True), "slow", "special token '北京' is a piece"),
        (but(*LETTERS, ("北京", 0, CONTROL), kind=UNIGRAM), "none", "the slow class takes '北京'"),
    ],
)  # fmt: skip
def test_forms(pieces: Pieces, form: str, why: str) -> None:
    found = form_of(pieces)
    assert found.form == form and why in found.why
    line = found.line or ""
    assert ("fast" in line) == (form != "fast") and ("--tokenizer none" in line) == (form == "none")
