"""The tokenizer of a folder: found, copied, and a wrong one told apart by size and by content."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.tokenizer import build_tokenizer
from megatron_sgt.errors import DataError
from megatron_sgt.export.hf.tokenizer import write_tokenizer
from megatron_sgt.export.tokenizers import (
    begins_texts,
    check_fits,
    check_same,
    copy_tokenizer,
    tokenizer_at,
    tokenizer_forms,
    tokenizer_in,
)
from tests.helpers.hf_tokenizers import llama_3
from tests.helpers.single import small_config
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


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_how_texts_begin_comes_back_from_an_export(kind: str, tmp_path: Path) -> None:
    source = llama_3(tmp_path / "in") if kind == "huggingface" else write_sentencepiece(tmp_path / "sp.model")
    wanted = TokenizerConfig.at(source, add_bos=True)
    (tmp_path / "hf").mkdir()
    run = small_config(model={"vocab_size": 512}, data={"tokenizer": wanted.model_dump()})
    write_tokenizer(wanted, tmp_path / "hf", run)
    found = tokenizer_in(tmp_path / "hf")
    assert found is not None and found.add_bos and found.type == kind
    copy_tokenizer(tmp_path / "hf", tmp_path / "copy", found)
    assert tokenizer_forms(tmp_path / "copy")[0].add_bos
    again = build_tokenizer(tokenizer_at(tmp_path / "copy", found))
    assert again.fingerprint() == build_tokenizer(wanted).fingerprint(), "its data sets are still its own"


def test_a_tokenizer_that_begins_texts_by_itself(tmp_path: Path) -> None:
    found = tokenizer_in(llama_3(tmp_path / "llama"))
    assert found is not None and not found.add_bos
    assert begins_texts(tmp_path / "llama") == "<|begin_of_text|>"
    assert begins_texts(write_hf_tokenizer(tmp_path / "other")) is None
