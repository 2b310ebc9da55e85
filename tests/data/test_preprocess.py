import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_sgt.config import TokenizerConfig
from megatron_sgt.data.encoding import EncodedKey
from megatron_sgt.data.preprocess import PreprocessOptions, preprocess
from megatron_sgt.data.tokenizer import build_tokenizer
from megatron_sgt.data.writer import DatasetWriter
from megatron_sgt.errors import DataError
from megatron_sgt.files import sha256_of
from tests.helpers.hf_tokenizers import bert
from tests.helpers.sentencepieces import train


def read_back(prefix: str) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1)), "one sequence per document"
    return [dataset[i].tolist() for i in range(len(dataset))]


def write(path: Path, records: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def options(sp_model: str, source: str, prefix: Path, **changes: object) -> PreprocessOptions:
    tokenizer = TokenizerConfig(type="sentencepiece", model=sp_model)
    return PreprocessOptions((source,), str(prefix), tokenizer, **changes)  # type: ignore[arg-type]


def test_tokens_are_those_of_the_tokenizer(tmp_path: Path, sp_model: str, texts: list[str]) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    tokenizer = build_tokenizer(TokenizerConfig(type="sentencepiece", model=sp_model))
    for append_eod in (False, True):
        prefix = tmp_path / f"out{append_eod}"
        report = preprocess(options(sp_model, source, prefix, append_eod=append_eod))
        ending = [tokenizer.eod] if append_eod else []
        written = read_back(f"{prefix}_text_document")
        assert written == [tokenizer.encode(text) + ending for text in texts]
        assert report.datasets[0].documents == len(texts)
        assert report.datasets[0].tokens == sum(map(len, written))


def test_a_tokenizer_without_a_fast_form_is_said(
    tmp_path: Path, sp_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "a text"}])
    preprocess(options(sp_model, source, tmp_path / "fast"))
    assert "note" not in capsys.readouterr().err
    other = train(tmp_path / "m.model", model_type="word", vocab_size=600)
    preprocess(options(str(other), source, tmp_path / "slow"))
    assert "note: the tokenizer has no fast form (it is a model of whole words)" in capsys.readouterr().err


def test_workers_do_not_change_the_result(
    tmp_path: Path, sp_model: str, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """About 40 chunks, so that the workers finish them out of order."""
    monkeypatch.setattr("megatron_sgt.data.readers.CHUNK_DOCUMENTS", len(texts) // 40)
    source = write(tmp_path / "a.jsonl", [{"text": text * (1 + i % 7)} for i, text in enumerate(texts)])
    sums = []
    for num_workers in (1, 3):
        preprocess(options(sp_model, source, tmp_path / f"w{num_workers}", num_workers=num_workers))
        sums.append([sha256_of(tmp_path / f"w{num_workers}_text_document{suffix}") for suffix in (".bin", ".idx")])
    assert sums[0] == sums[1]


def test_several_keys(tmp_path: Path, sp_model: str) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "layer", "title": "t"}, {"text": "head", "title": ""}])
    report = preprocess(options(sp_model, source, tmp_path / "out", json_keys=("text", "title")))
    assert len(read_back(f"{tmp_path}/out_text_document")) == 2
    assert len(read_back(f"{tmp_path}/out_title_document")) == 1
    assert [(d.documents, d.empty) for d in report.datasets] == [(2, 0), (1, 1)]


def test_a_key_twice(tmp_path: Path, sp_model: str) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "layer"}])
    with pytest.raises(DataError, match="--json-keys names 'text' more than once"):
        preprocess(options(sp_model, source, tmp_path / "out", json_keys=("text", "text")))


def test_empty_documents_and_broken_unicode(tmp_path: Path, sp_model: str) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": ""}, {"text": "a\ud800b"}, {"text": ""}])
    report = preprocess(options(sp_model, source, tmp_path / "out", append_eod=True))
    assert (report.datasets[0].documents, report.datasets[0].empty, report.repaired) == (1, 2, 1)
    tokenizer = build_tokenizer(TokenizerConfig(type="sentencepiece", model=sp_model))
    assert tokenizer.decode(read_back(f"{tmp_path}/out_text_document")[0][:-1]) == "a?b"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_bad_line_leaves_nothing_behind(tmp_path: Path, sp_model: str, num_workers: int) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "ok " * 200}] * 5000)
    with open(source, "a") as stream:
        stream.write("oops\n")
    with pytest.raises(DataError, match=r"a\.jsonl:5001: not a JSON line"):
        preprocess(options(sp_model, source, tmp_path / "out", num_workers=num_workers))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_existing_output_is_kept_unless_asked(tmp_path: Path, sp_model: str) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "layer"}])
    preprocess(options(sp_model, source, tmp_path / "out"))
    before = sha256_of(tmp_path / "out_text_document.bin")
    source = write(tmp_path / "a.jsonl", [{"text": "head"}])
    with pytest.raises(DataError, match=r"out_text_document\.bin and .*\.idx exists already.*--overwrite"):
        preprocess(options(sp_model, source, tmp_path / "out"))
    assert sha256_of(tmp_path / "out_text_document.bin") == before
    preprocess(options(sp_model, source, tmp_path / "out", overwrite=True))
    assert sha256_of(tmp_path / "out_text_document.bin") != before


def test_nothing_to_write(tmp_path: Path, sp_model: str) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match="no document with text"):
        preprocess(options(sp_model, source, tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_unfinished_writer(tmp_path: Path) -> None:
    prefix = str(tmp_path / "sub" / "x")
    with DatasetWriter(prefix, "int32", overwrite=False) as writer:
        writer.add(EncodedKey(np.arange(5, dtype=np.int32), np.array([2, 3], dtype=np.int32), 0))
        assert not Path(prefix + ".bin").exists() and not Path(prefix + ".idx").exists()
        with pytest.raises(DataError, match="another process is writing"):
            DatasetWriter(prefix, "int32", overwrite=False)
    assert not list(Path(prefix).parent.iterdir())


def test_documents_begin_with_the_token_if_asked(tmp_path: Path, sp_model: str) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "layer"}, {"text": ""}, {"text": "head"}])
    tokenizer = TokenizerConfig(type="sentencepiece", model=sp_model, add_bos=True)
    preprocess(PreprocessOptions((source,), str(tmp_path / "out"), tokenizer, append_eod=True))
    encode = build_tokenizer(tokenizer).encode
    assert read_back(f"{tmp_path}/out_text_document") == [[1, *encode(text), 2] for text in ("layer", "head")]
    assert json.loads((tmp_path / "out_text_document.json").read_text())["add_bos"] is True
    folder = bert(tmp_path / "bert")
    for changes, message in (
        (
            {"tokenizer": TokenizerConfig.at(folder, add_bos=True)},
            "has no beginning-of-text token .* leave out --add-bos",
        ),
        ({"tokenizer": TokenizerConfig.at(folder), "append_eod": True}, "has no end-of-text token"),
    ):
        with pytest.raises(DataError, match=message):
            preprocess(PreprocessOptions((source,), str(tmp_path / "no"), **changes))  # type: ignore[arg-type]
    assert not list(tmp_path.glob("no*"))


def test_memory_does_not_grow_with_the_input(tmp_path: Path, sp_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sgt.data.readers.CHUNK_DOCUMENTS", 500)
    monkeypatch.setattr("megatron_sgt.data.writer._BLOCK", 1000)
    peaks = []
    for count in (5_000, 25_000):
        source = tmp_path / f"{count}.jsonl"
        source.write_text('{"text": "a"}\n' * count)
        tracemalloc.start()
        preprocess(options(sp_model, str(source), tmp_path / f"out{count}"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert abs(peaks[1] - peaks[0]) < 50_000, f"an index of 25,000 documents in memory has 300,000 bytes: {peaks}"
