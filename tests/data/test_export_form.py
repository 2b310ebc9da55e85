import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sgt.arch import ffn
from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.export_form import export_form, export_problems
from tests.helpers.hf_tokenizers import bert
from tests.helpers.sentencepieces import train
from tests.helpers.single import small_config


def python_alone(folder: Path, name: str) -> Path:
    folder.mkdir()
    settings = {"tokenizer_class": name, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_what_has_no_form_is_known_before_the_run(tmp_path: Path, sp_model: str) -> None:
    assert export_form(None).form == export_form(TokenizerConfig.at(sp_model, add_bos=True)).form == "fast"
    assert export_form(TokenizerConfig.at(bert(tmp_path / "bert"))).line is None
    found = export_form(TokenizerConfig.at(python_alone(tmp_path / "bytes", "ByT5Tokenizer")))
    assert found.form == "none" and "a ByT5Tokenizer exists in Python alone, and gives other ids" in str(found.line)


def test_a_class_in_python_that_adds_nothing_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import ByT5Tokenizer

    monkeypatch.setattr(ByT5Tokenizer, "build_inputs_with_special_tokens", lambda self, ids, _=None: ids)
    found = export_form(TokenizerConfig.at(python_alone(tmp_path / "bytes", "ByT5Tokenizer")))
    assert found.form == "slow" and "an export holds a slow one of the same ids" in str(found.line)


def test_rules_of_the_user_may_have_no_form(tmp_path: Path) -> None:
    """With add_bos, where no slow class helps: the conversion itself shows it, at the export."""
    path = str(train(tmp_path / "m.model", rules={"a b": "c", "a": " b"}))
    assert export_form(TokenizerConfig(type="sentencepiece", model=path)).line is None
    found = export_form(TokenizerConfig(type="sentencepiece", model=path, add_bos=True))
    assert found.may_fail and "may have no form" in str(found.line) and "rules of normalisation of its own" in found.why


def test_a_kind_of_layer_without_an_exported_form_is_told_beside_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = {"type": "huggingface", "model": str(python_alone(tmp_path / "bytes", "ByT5Tokenizer"))}
    config = small_config(data={"tokenizer": tokenizer}, model={"vocab_size": 512})
    assert [certain for _, certain in export_problems(config)] == [True]
    monkeypatch.setitem(ffn.KINDS, "swiglu", replace(ffn.KINDS["swiglu"], hidden_act=None))
    [(kind, certain), _] = export_problems(config)
    assert certain and kind == "model.activation swiglu: no exported model can compute this kind"
    assert list(export_problems(small_config(model={"activation": "gelu"}))) == []
