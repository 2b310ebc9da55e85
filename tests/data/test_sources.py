from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sgt.config import Config
from megatron_sgt.data.sources import validate_data
from megatron_sgt.errors import DataError
from tests.helpers.datasets import write_dataset

MakeConfig = Callable[..., Config]


def test_summary(tmp_path: Path, make_config: MakeConfig) -> None:
    a = write_dataset(tmp_path / "a_text_document", [20] * 10)
    b = write_dataset(tmp_path / "b_text_document", [40] * 10)
    cfg = make_config([1, a.removesuffix("_text_document"), 3, b], **{"train.eval_interval": 5, "train.eval_iters": 1})
    summary = validate_data(cfg)
    assert (summary.documents, summary.tokens, summary.vocab_size, summary.tokenizer) == (20, 600, 1000, None)
    assert summary.train_samples == (180 - 1) // 16 + (360 - 1) // 16
    assert (summary.valid_samples, summary.test_samples) == (1 + 2, 0)
    assert [source.weight for source in summary.sources] == [0.25, 0.75]
    assert summary.samples_needed == 80
    assert summary.epochs == pytest.approx(80 / summary.train_samples)
    assert len(summary.notes) == 2
    assert "taken as" in summary.notes[0] and "a split that has 3" in summary.notes[1]


def test_with_a_tokenizer(tmp_path: Path, make_config: MakeConfig, sp_model: str) -> None:
    prefix = write_dataset(tmp_path / "a", [50] * 10, vocab_size=320)
    tokenizer = {"type": "sentencepiece", "model": sp_model}
    cfg = make_config(prefix, **{"data.tokenizer": tokenizer, "model.vocab_size": None})
    summary = validate_data(cfg)
    assert summary.vocab_size == 320
    assert summary.tokenizer == f"sentencepiece {sp_model}"
    with pytest.raises(DataError, match="vocab_size 300 is smaller than the 320 ids"):
        validate_data(make_config(prefix, **{"data.tokenizer": tokenizer, "model.vocab_size": 300}))
    begins = {**tokenizer, "add_bos": True}
    with pytest.raises(DataError, match=r"the documents of .*a do not begin with .*data\.tokenizer\.add_bos is true"):
        validate_data(make_config(prefix, **{"data.tokenizer": begins, "model.vocab_size": None}))
    other = write_dataset(tmp_path / "b", [50] * 10, vocab_size=321)
    with pytest.raises(DataError, match="token id 320, but the vocabulary has 320 ids"):
        validate_data(make_config(other, **{"data.tokenizer": tokenizer, "model.vocab_size": None}))


def test_mistakes(tmp_path: Path, make_config: MakeConfig) -> None:
    prefix = write_dataset(tmp_path / "a", [20] * 10)
    with pytest.raises(DataError, match=r"data\.data_path is empty"):
        validate_data(make_config([]))
    with pytest.raises(DataError, match=r"no indexed data set at .*nope"):
        validate_data(make_config(str(tmp_path / "nope")))
    with pytest.raises(DataError, match=r"data\.data_path: blend weight 1e-09 is less than"):
        validate_data(make_config([1e-9, prefix, 1, prefix]))
    with pytest.raises(
        DataError, match=r"the train split .*gets 9 of 10 documents with 180 tokens.*sample of 180 \+ 1"
    ):
        validate_data(make_config(prefix, seq_length=180))
    validate_data(make_config(prefix, seq_length=179))


def test_validation_split_is_required_only_if_used(tmp_path: Path, make_config: MakeConfig) -> None:
    prefix = write_dataset(tmp_path / "a", [20] * 8)
    summary = validate_data(make_config(prefix, **{"data.split": "949,50,1"}))
    assert summary.valid_samples == 0
    with pytest.raises(
        DataError, match=r"the valid split \(data\.split 949,50,1\) gets 0 of 8 documents .*eval_interval"
    ):
        validate_data(make_config(prefix, **{"data.split": "949,50,1", "train.eval_interval": 10}))


def test_validation_sets_are_checked_like_training_data(tmp_path: Path, make_config: MakeConfig) -> None:
    prefix = write_dataset(tmp_path / "a_text_document", [20] * 10)
    wiki = write_dataset(tmp_path / "wiki", [20] * 10, start=7)
    short = write_dataset(tmp_path / "short", [9])

    def check(path: str, **more: object) -> tuple[str, ...]:
        return validate_data(
            make_config(prefix, **{"data.valid": {"wiki": path}, "train.eval_interval": 5, **more})
        ).notes

    once = "validation set wiki: 10 documents, 200 tokens; each validation reads"
    assert f"{once} the first 8 of its 12 samples" in check(wiki, **{"train.eval_iters": 1})
    assert f"{once} all its 12 samples" in check(wiki, **{"train.eval_iters": 2})
    with pytest.raises(DataError, match=r"data\.valid\.wiki: .*short has 9 tokens, less than one sample of 16 \+ 1"):
        check(short)
    long = write_dataset(tmp_path / "long", [1200], vocab_size=1001)
    with pytest.raises(DataError, match="token id 1000, but the vocabulary has 1000 ids"):
        check(long)
    with pytest.raises(DataError, match=r"no indexed data set at .*nope"):
        check(str(tmp_path / "nope"))


def test_a_validation_set_that_is_trained_on_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    """By its path however it is written, and as a copy under another name."""
    prefix = write_dataset(tmp_path / "a_text_document", [20] * 10)
    other = write_dataset(tmp_path / "b", [20] * 10, start=1)
    copy = write_dataset(tmp_path / "copy", [20] * 10)
    linked = tmp_path / "link"
    linked.symlink_to(tmp_path)
    for path in (str(tmp_path / "a"), f"{linked}/a_text_document", copy):
        cfg = make_config([1, other, 1, prefix], **{"data.valid": {"code": path}})
        with pytest.raises(
            DataError, match=r"data\.valid\.code: .* is trained on .*a_text_document.*so that validation"
        ):
            validate_data(cfg)
        allowed = {"data.valid": {"code": path}, "data.allow_validation_leak": True}
        assert validate_data(make_config([1, other, 1, prefix], **allowed)).notes
    unread = validate_data(make_config(prefix, **{"data.valid": {"code": other}}))
    assert [note for note in unread.notes if "never measured while train.eval_interval is 0" in note]


def test_named_sets_may_be_the_only_ones(tmp_path: Path, make_config: MakeConfig) -> None:
    prefix = write_dataset(tmp_path / "a", [20] * 10)
    named = {"data.valid": {"b": write_dataset(tmp_path / "b", [20] * 5, start=3)}}
    often = {"train.eval_interval": 5, "data.split": "1,0,0"}
    with pytest.raises(DataError, match="the valid split"):
        validate_data(make_config(prefix, **often))
    assert validate_data(make_config(prefix, **often, **named)).valid_samples == 0
    with pytest.raises(DataError, match="the valid split"):
        validate_data(make_config(prefix, **{**often, **named, "data.split": "999,1,0"}))
