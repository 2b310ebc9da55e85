"""A sentencepiece model in an exported folder, through AutoTokenizer: fast, slow, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.export_form import export_form
from megatron_sgt.data.hard_texts import HARD_TEXTS
from megatron_sgt.data.tokenizer import build_tokenizer
from megatron_sgt.errors import DataError
from megatron_sgt.export.hf.sentencepiece_files import SLOW_CLASS, sameness, write_sentencepiece
from megatron_sgt.export.hf.tokenizer_files import Settings, differing_texts
from tests.helpers.sentencepieces import DEFINED, EXTRA, PREFIX, UNLIKE_ANY, train


def exported(tmp_path: Path, bos: bool = False, **options: Any) -> tuple[Any, Any, tuple[str, ...]]:
    """The training tokenizer, that of the folder, and what its user must know."""
    path, folder = train(tmp_path / "m.model", **options), tmp_path / "out"
    folder.mkdir()
    training = build_tokenizer(TokenizerConfig(type="sentencepiece", model=str(path)))
    settings = Settings(512, ("<s>", 1) if bos else None)
    notes = write_sentencepiece(path, training, settings, folder).notes
    loaded = AutoTokenizer.from_pretrained(folder)
    assert differing_texts(training, loaded, 1 if bos else None, same=sameness(path, loaded)) == ()
    assert (folder / "tokenizer.model").read_bytes() == path.read_bytes()
    return training, loaded, notes


def test_a_fast_one(tmp_path: Path) -> None:
    training, loaded, notes = exported(tmp_path, bos=True, **DEFINED, **EXTRA)
    assert loaded.is_fast and not any("slow" in note for note in notes)
    text = "<|user|>  say<|end|>\n<s> ab abcd▁ [MASK]"
    ids = training.encode(text)
    assert loaded(text)["input_ids"] == [1, *ids]
    assert loaded.decode([1, *ids], skip_special_tokens=True) == loaded.decode(ids) == training.decode(ids)
    batch = loaded(["a", "a longer text"], padding=True)
    assert batch["attention_mask"][0][0] == 0 and batch["attention_mask"][0][-1] == 1


def test_a_slow_one(tmp_path: Path) -> None:
    training, loaded, (note,) = exported(tmp_path, model_type="word", vocab_size=600, eos_id=-1, **PREFIX)
    assert (type(loaded).__name__, len(loaded)) == (SLOW_CLASS, 600)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.sep_token) == (1, None, None)
    assert "because it is a model of whole words" in note and "`tokenizer.sp_model.decode(ids)`" in note
    for text in HARD_TEXTS:
        assert loaded(text)["input_ids"] == (ids := training.encode(text))
        assert loaded.sp_model.decode(ids) == training.decode(ids)
    again = loaded.save_pretrained(tmp_path / "again") and AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(HARD_TEXTS[0])["input_ids"] == training.encode(HARD_TEXTS[0])


@pytest.mark.parametrize("bos", [True, False])
def test_none(bos: bool, tmp_path: Path) -> None:
    """Said beforehand in the words of the refusal."""
    options = {"model_type": "word", "vocab_size": 600} if bos else {**UNLIKE_ANY, "vocab_size": 100}
    form = export_form(
        TokenizerConfig(type="sentencepiece", model=str(train(tmp_path / "m.model", **options)), add_bos=bos)
    )
    assert form.form == "none"
    with pytest.raises(DataError, match=r"m\.model cannot be exported: .*fast or slow.*--tokenizer none") as refusal:
        exported(tmp_path, bos, **options)
    assert str(form.line) in str(refusal.value)
