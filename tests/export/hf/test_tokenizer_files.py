"""``tokenizer(text)`` of an exported folder is what training saw, for every kind of tokenizer and of folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.hard_texts import HARD_TEXTS
from megatron_sgt.data.tokenizer import Tokenizer, build_tokenizer
from megatron_sgt.errors import DataError
from megatron_sgt.export.architecture import WrittenTokenizer
from megatron_sgt.export.forms import FORMS, Form
from megatron_sgt.export.hf import configuration_sgt
from megatron_sgt.export.hf.tokenizer import write_tokenizer
from megatron_sgt.export.hf.tokenizer_files import differing_texts
from tests.helpers.hf_tokenizers import KINDS
from tests.helpers.single import small_config
from tests.helpers.tokenizers import write_sentencepiece


def exported(
    source: Path, folder: Path, add_bos: bool = False, template: str = "none"
) -> tuple[Tokenizer, Any, WrittenTokenizer]:
    """The tokenizer ``source`` as training has it, and as transformers reads it from ``folder``."""
    wanted = TokenizerConfig.at(source, add_bos)
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    run = small_config(model={"vocab_size": 1024, "seq_length": 32}, data={"tokenizer": wanted.model_dump()})
    written = write_tokenizer(wanted, folder, run, template)
    return build_tokenizer(wanted), AutoTokenizer.from_pretrained(folder), written


def made(kind: str, folder: Path) -> Path:
    return KINDS[kind](folder) if kind in KINDS else write_sentencepiece(folder / "tokenizer.model")


@pytest.mark.parametrize("kind", [*KINDS, "sentencepiece"])
def test_a_text_becomes_the_ids_of_training(kind: str, tmp_path: Path) -> None:
    source = made(kind, tmp_path / "in")
    training, loaded, written = exported(source, tmp_path / "out")
    assert not differing_texts(training, loaded, None)
    texts = [text for text in HARD_TEXTS if text]
    assert loaded(texts)["input_ids"] == [training.encode(text) for text in texts], "in a batch, too"
    padded = loaded(texts, padding=True)
    kept = [[i for i, one in zip(*row, strict=True) if one] for row in zip(*padded.values(), strict=True)]
    assert kept == [training.encode(text) for text in texts] and loaded.pad_token_id == written.ids.pad
    assert loaded.model_max_length == 32 and set(loaded("a")) == {"input_ids", "attention_mask"}
    assert (loaded.bos_token_id, loaded.eos_token_id) == (written.ids.bos, written.ids.eos)
    again = TokenizerConfig.at(tmp_path / "out")
    assert kind == "sentencepiece" or build_tokenizer(again).fingerprint() == training.fingerprint()
    if training.beginning is not None:
        training, loaded, written = exported(source, tmp_path / "bos", add_bos=True)
        assert not differing_texts(training, loaded, training.bos)
        assert loaded.bos_token_id == training.bos == written.ids.bos
        assert written.notes[0].startswith("Every text begins with `")
        loaded.save_pretrained(tmp_path / "saved")
        assert not differing_texts(training, AutoTokenizer.from_pretrained(tmp_path / "saved"), training.bos)


def test_beside_a_qwen2_model_only_its_own_kind_is_safe(tmp_path: Path) -> None:
    for kind in ("qwen_2", "gpt_2_files", "llama_3", "gemma"):
        training, _, written = exported(made(kind, tmp_path / kind), tmp_path / f"{kind}_out")
        (tmp_path / f"{kind}_out" / "config.json").write_text('{"model_type": "qwen2"}')
        differing = differing_texts(training, AutoTokenizer.from_pretrained(tmp_path / f"{kind}_out"), None)
        assert written.like_qwen == (kind == "qwen_2") and not (written.like_qwen and differing), kind


class _Asked(BaseException):
    pass


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_nothing_is_asked_where_code_lies_in_the_folder(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> str:
        raise _Asked

    training, _, _ = exported(made("llama_3", tmp_path / "in"), tmp_path / "out")
    values = {"vocab_size": 512, "num_hidden_layers": 1, "sgt_num_layers": 1} | form.head()
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))
    for name in form.files:
        shutil.copyfile(Path(configuration_sgt.__file__).parent / name, tmp_path / "out" / name)
    monkeypatch.setattr("builtins.input", ask)
    for trust in (True, False):
        loaded = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=trust)
        assert not differing_texts(training, loaded, None)
    monkeypatch.setattr("builtins.input", lambda *_: (_ for _ in ()).throw(EOFError()))
    assert not differing_texts(training, AutoTokenizer.from_pretrained(tmp_path / "out"), None), "nobody can answer"


def test_special_tokens_in_a_text_are_text(tmp_path: Path) -> None:
    for kind, make in KINDS.items():
        training = build_tokenizer(TokenizerConfig.at(make(tmp_path / kind)))
        added: dict[int, Any] = training.fast.get_added_tokens_decoder()  # type: ignore[attr-defined]
        special = {i: t.content for i, t in added.items() if t.special and t.content not in ("<unk>", "[UNK]")}
        for text in special.values():
            assert not {*special} & {*training.encode(f"{text}a{text} {text} b{text}")}, (kind, text)
    qwen = build_tokenizer(TokenizerConfig.at(tmp_path / "qwen_2"))
    assert len(qwen.encode("<think>")) == 1, "an added token that is not special stays one"


def test_a_chat_template_passes_through(tmp_path: Path) -> None:
    source = made("llama_3", tmp_path / "in")
    talk = [{"role": "user", "content": "Hi"}]
    training, loaded, written = exported(source, tmp_path / "none")
    assert loaded.chat_template is None and "chat template" in written.notes[-1]
    training, loaded, written = exported(source, tmp_path / "keep", template="keep")
    ids = loaded.apply_chat_template(talk, tokenize=True, return_dict=False)
    names = loaded.convert_ids_to_tokens(ids)
    assert (names[0], names[-1], names.count("<|start|>")) == ("<|start|>", "<|stop|>", 1)
    assert not differing_texts(training, loaded, None, as_text=True) and differing_texts(training, loaded, None)
    assert "split_special_tokens=True" in written.notes[-1]
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}!")
    pieces = write_sentencepiece(tmp_path / "sp.model")
    training, loaded, _ = exported(pieces, tmp_path / "mine", template=str(tmp_path / "mine.jinja"))
    assert loaded.apply_chat_template(talk, tokenize=False) == "Hi!"
    with pytest.raises(DataError, match="the tokenizer has no chat template; give a file"):
        exported(made("bert", tmp_path / "bert"), tmp_path / "x", template="keep")
    with pytest.raises(DataError, match=r"--chat-template .*absent cannot be read"):
        exported(source, tmp_path / "y", template=str(tmp_path / "absent"))


def test_a_tokenizer_in_python_alone_is_refused_where_it_adds_tokens(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    settings = {"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(settings))
    training = build_tokenizer(TokenizerConfig.at(tmp_path / "in"))
    assert training.encode("a</s>") == [byte + 3 for byte in b"a</s>"]
    with pytest.raises(DataError, match=r"is a ByT5Tokenizer, which exists in Python alone and makes other ids of"):
        exported(tmp_path / "in", tmp_path / "out")


def test_a_tokenizer_that_needs_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    settings = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["code.MyTokenizer", None]}}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="no Hugging Face tokenizer could be read"):
        build_tokenizer(TokenizerConfig.at(tmp_path / "in"))
