"""Tokenizer files of an exported folder, through AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.hard_texts import HARD_TEXTS
from megatron_sgt.data.tokenizer import build_tokenizer
from megatron_sgt.data.train_tokenizer import train_tokenizer
from megatron_sgt.errors import DataError
from megatron_sgt.export.architecture import TokenIds
from megatron_sgt.export.hf.tokenizer import write_tokenizer
from tests.helpers.single import small_config


def config(**data: Any) -> Any:
    return small_config(model={"vocab_size": 512}, data=data)


@pytest.fixture
def model(tmp_path: Path) -> TokenizerConfig:
    lines = [json.dumps({"text": text}) for text in (*HARD_TEXTS[:7], Path(__file__).read_text())]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    train_tokenizer([str(tmp_path / "texts.jsonl")], str(tmp_path / "sp.model"), 400)
    return TokenizerConfig(type="sentencepiece", model=str(tmp_path / "sp.model"))


def test_a_sentencepiece_model_becomes_a_fast_tokenizer(model: TokenizerConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert write_tokenizer(model, out, config()).ids == TokenIds(bos=1, eos=2, pad=0)
    loaded = AutoTokenizer.from_pretrained(out)
    trained = build_tokenizer(model)
    assert loaded.is_fast and len(loaded) == 400 and loaded.padding_side == "left"
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 0)
    for text in (*HARD_TEXTS, Path(__file__).read_text()):
        ids = trained.encode(text)
        assert loaded(text)["input_ids"] == ids, "no special token is added, none is read out of a text"
        assert loaded.decode(ids) == trained.decode(ids)
    batch = loaded(["a", "a longer text"], padding=True)
    assert batch["attention_mask"][0][0] == 0 and batch["attention_mask"][0][-1] == 1
    loaded.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(HARD_TEXTS[16])["input_ids"] == trained.encode(
        HARD_TEXTS[16]
    )


def bare_tokenizer(path: Path) -> None:
    """A byte-level BPE with an end-of-text token."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        HARD_TEXTS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet),
    )
    fast.save(str(path))


@pytest.mark.parametrize("kind", ["file", "bare folder", "folder"])
def test_hugging_face_tokenizers_are_written(kind: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    bare_tokenizer(source / "tokenizer.json")
    if kind == "folder":
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    wanted = TokenizerConfig(type="huggingface", model=str(source / "tokenizer.json" if kind == "file" else source))
    trained = build_tokenizer(wanted)
    assert write_tokenizer(wanted, out, config()).ids == TokenIds(None, trained.eod, trained.eod)
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.eos_token_id == trained.eod == 0
    for text in HARD_TEXTS:
        assert loaded(text)["input_ids"] == trained.encode(text)


def test_a_wrong_tokenizer_is_refused(model: TokenizerConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.vocab_size 128 is smaller than the 400 ids"):
        write_tokenizer(model, tmp_path, small_config())
    (tmp_path / "data.json").write_text(json.dumps({"tokenizer_fingerprint": "f" * 64}))
    with pytest.raises(DataError, match=r"is not the one that .* was made with"):
        write_tokenizer(model, tmp_path, config(data_path=[str(tmp_path / "data")]))
    absent = TokenizerConfig(type="sentencepiece", model="nowhere.model")
    with pytest.raises(DataError, match=r"nowhere\.model does not exist"):
        write_tokenizer(absent, tmp_path, config())


def test_data_whose_tokenizer_gave_other_ids_then_is_said(model: TokenizerConfig, tmp_path: Path) -> None:
    """The same files, read by another version of their library."""
    run = config(data_path=[str(tmp_path / "data")])
    for digest, count in ((build_tokenizer(model).digest_of_ids(), 0), ("f" * 64, 1)):
        (tmp_path / "data.json").write_text(json.dumps({"tokenizer_ids": digest}))
        out = tmp_path / str(count)
        out.mkdir()
        notes = [note for note in write_tokenizer(model, out, run).notes if "The data set data was made" in note]
        assert len(notes) == count
