"""What is said of a data set, against the data set; tests/tools/test_inspect_data.py starts the command."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sgt.config import Config
from megatron_sgt.data.gpt_dataset import build_datasets
from megatron_sgt.data.inspection import assumed_config, inspect
from megatron_sgt.errors import DataError
from tests.helpers.datasets import write_dataset

MakeConfig = Callable[..., Config]
LENGTHS = [3, 9, 20, 0, 5, 7, 40, 2, 2, 6]


def test_a_run_is_shown_in_its_order(tmp_path: Path, make_config: MakeConfig) -> None:
    a, b = write_dataset(tmp_path / "a", LENGTHS, 100), write_dataset(tmp_path / "b", LENGTHS, 400)
    cfg = make_config(
        [0.75, a, 0.25, b], 16, **{"data.packing": "best_fit", "data.reset_attention_mask": True, "data.split": "8,2"}
    )
    found = inspect(cfg, "train", 2, 3)
    assert [file.weight for file in found.files] == [0.75, 0.25]
    assert not cfg.data_cache_dir.exists(), "nothing stays"
    train, valid, _ = build_datasets(cfg, None)
    for view in found.samples:
        ids = [i for part in view.segments for i in part.ids]
        assert ids == train[view.index]["tokens"].tolist()
    assert [view.index for view in found.samples] == [2, 3, 4]
    part, held_out, none = found.files[0].splits
    assert (part.documents, part.tokens, part.samples) == (8, 86, len(train.parts[0]))
    assert part.padding == pytest.approx(1 - 86 / (16 * part.samples)) and 0 < (part.attended or 0) < 1
    assert held_out.samples == len(valid.parts[0]) and (none.samples, none.padding, none.attended) == (0, None, None)
    text = "\n".join(found.lines())
    assert "weight 0.75" in text and "packing best_fit" in text and "% of the causal pairs" in text
    with pytest.raises(DataError, match=r"the test split \(data\.split 8,2\) holds no sample; choose another --split"):
        inspect(cfg, "test", 0, 1)
    assert inspect(cfg, "test", 0, 0).samples == ()


def test_a_cache_that_the_run_names_is_used(tmp_path: Path, make_config: MakeConfig) -> None:
    prefix = write_dataset(tmp_path / "a", LENGTHS)
    cfg = make_config(prefix, 8, **{"data.data_cache_path": str(tmp_path / "cache")})
    [sample] = inspect(cfg, "train", 0, 1).samples
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert len(sample.segments) == 1, "the run does not tell documents apart"


def test_without_a_run_documents_are_kept_apart(tmp_path: Path, sp_model: str) -> None:
    prefix = write_dataset(tmp_path / "a_text_document", LENGTHS, vocab_size=300)
    cfg = assumed_config(prefix.removesuffix("_text_document"), ["model.seq_length=16"])
    assert (cfg.model.seq_length, cfg.data.reset_attention_mask, cfg.data.eod_mask_loss) == (16, True, True)
    assert assumed_config(prefix, []).model.seq_length == sum(LENGTHS) - 1
    [sample] = inspect(assumed_config(prefix, []), "train", 0, 1).samples
    assert len(sample.segments) == sum(n > 0 for n in LENGTHS) and sample.segments[0].text is None
    told = assumed_config(prefix, ["data.tokenizer={type: sentencepiece, model: %s}" % sp_model])  # noqa: UP031
    assert inspect(told, "train", 0, 1).samples[0].segments[0].text is not None
