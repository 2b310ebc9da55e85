"""The tokenizer of a folder: found, copied, and a wrong one told apart by size and by content."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.tokenizer import build_tokenizer
from megatron_sgt.errors import DataError
from megatron_sgt.export.tokenizers import check_fits, check_same, copy_tokenizer, tokenizer_at, tokenizer_in
from tests.helpers.tokenizers import write_hf_tokenizer, write_sentencepiece


def test_finds_and_copies_a_huggingface_tokenizer(tmp_path: Path) -> None:
    source = write_hf_tokenizer(tmp_path / "model")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    found = tokenizer_in(source)
    assert found is not None
    copy_tokenizer(source, tmp_path / "copy", found)
    moved = tokenizer_at(tmp_path / "copy", found)
    assert moved == TokenizerConfig(type="huggingface", model=str(tmp_path / "copy"))
    assert build_tokenizer(moved).fingerprint() == build_tokenizer(found).fingerprint()
    assert (tmp_path / "copy" / "chat_template.jinja").is_file()


def test_finds_and_copies_a_sentencepiece_model(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "model" / "tokenizer.model")
    found = tokenizer_in(tmp_path / "model")
    assert found is not None and found.type == "sentencepiece"
    copy_tokenizer(tmp_path / "model", tmp_path / "copy", found)
    assert build_tokenizer(tokenizer_at(tmp_path / "copy", found)).encode("the fox")
    assert tokenizer_in(tmp_path) is None


def test_size_and_content_must_match(tmp_path: Path) -> None:
    one = build_tokenizer(TokenizerConfig(type="huggingface", model=str(write_hf_tokenizer(tmp_path / "one"))))
    other_folder = write_hf_tokenizer(tmp_path / "other", text="quite different words in here, of another kind")
    other = build_tokenizer(TokenizerConfig(type="huggingface", model=str(other_folder)))
    check_same(one, one)
    check_fits(one, one.vocab_size)
    with pytest.raises(DataError, match=f"has {one.vocab_size} ids, the model knows 8"):
        check_fits(one, 8)
    with pytest.raises(DataError, match="into other ids"):
        check_same(one, other)
