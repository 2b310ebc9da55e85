"""Bad documents: each is named with file and line; up to a number of them is left out and counted, the same by every
command and for any number of workers."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_sgt.config import TokenizerConfig
from megatron_sgt.data.preprocess import PreprocessOptions, describe, preprocess
from megatron_sgt.data.train_tokenizer import train_tokenizer
from megatron_sgt.errors import DataError
from tests.helpers.commands import snapshot
from tests.helpers.edges import in_every_encoding
from tests.helpers.tokenizers import TEXT, write_sentencepiece

GOOD = json.dumps({"text": TEXT}).encode()
BAD_LINES = {
    "invalid UTF-8": (b'{"text": "caf\xe9"}', "not a JSON line: not UTF-8"),
    "invalid UTF-8 elsewhere": (b'{"text": "a", "m": "\xff"}', "not a JSON line: not UTF-8"),
    "cut off": (b'{"text": "a', "not a JSON line: Unterminated string"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "not a JSON line: Extra data"),
    "zeros": (bytes(40), "not a JSON line"),
    "no object": (b'["a"]', "expected a JSON object, got list"),
    "a number": (b"7", "expected a JSON object, got int"),
    "no such key": (b'{"body": "a"}', "under key 'text', got keys ['body']"),
    "a thousand other keys": (json.dumps(dict.fromkeys(map(str, range(1000)))).encode(), "'108'] and 988 more"),
    "null": (b'{"text": null}', "under key 'text', got a NoneType"),
    "no text": (b'{"text": NaN}', "under key 'text', got a float"),
    "a list": (b'{"text": ["a"]}', "under key 'text', got a list"),
    "the key twice": (b'{"text": "a", "text": "b"}', "key 'text' stands twice"),
    "lists in lists": (
        b'{"text": "a", "m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "JSON nested more than 500 deep",
    ),
    "objects in objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "JSON nested more than 500 deep"),
    "brackets without end": (b"[" * 100_000, "JSON nested more than 500 deep"),
}
FINE_LINES = {
    "ten thousand digits": b'{"text": "a", "m": ' + b"9" * 10_000 + b"}",
    "no number": b'{"text": "a", "m": [NaN, -Infinity, 1e999]}',
    "another key twice": b'{"m": 1, "text": "a", "m": {"text": 2}}',
    "brackets in a text": json.dumps({"text": '[{"\\' * 1000}).encode(),
    "half a character": b'{"text": "a\\ud800"}',
    "a byte order mark": b'\xef\xbb\xbf{"text": "a"}',
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "t.model"))


def options(folder: Path, model: str, source: Path, name: str = "o", **changes: object) -> PreprocessOptions:
    tokenizer = TokenizerConfig(type="sentencepiece", model=model)
    return PreprocessOptions((str(source),), str(folder / name), tokenizer, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_or_left_out(tmp_path: Path, model: str, name: str) -> None:
    line, reason = BAD_LINES[name]
    source = tmp_path / "a.jsonl"
    source.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD)
    before = snapshot(tmp_path)
    for command in (
        lambda: preprocess(options(tmp_path, model, source)),
        lambda: train_tokenizer([str(source)], str(tmp_path / "u.model"), 300),
    ):
        with pytest.raises(DataError) as refusal:
            command()
        assert str(refusal.value).startswith(f"{source}:3: ") and reason in str(refusal.value)
        assert "--max-bad-documents" in str(refusal.value) and "\n" not in str(refusal.value)
    assert snapshot(tmp_path) == before
    report = preprocess(options(tmp_path, model, source, max_bad_documents=1))
    assert report.datasets[0].documents == 2
    assert report.bad is not None and report.bad.startswith(
        f"1 bad documents left out, 33 % of 3; the first is {source}:3: "
    )
    assert train_tokenizer([str(source)], str(tmp_path / "u.model"), 300, max_bad_documents=1).bad == report.bad


@pytest.mark.parametrize("name", FINE_LINES)
def test_an_odd_line_is_read(tmp_path: Path, model: str, name: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(FINE_LINES[name] + b"\n")
    report = preprocess(options(tmp_path, model, tmp_path / "a.jsonl"))
    assert (report.datasets[0].documents, report.bad) == (1, None)


INVALID = pyarrow.Array.from_buffers(
    pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\5\0\0\0"), pyarrow.py_buffer(b"acaf\xe9")]
)
COLUMNS = {
    "invalid UTF-8": (INVALID, "row 2: column 'text' is not UTF-8"),
    "invalid UTF-8 in a dictionary": (
        pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1]), INVALID),
        "row 2: column 'text' is not UTF-8",
    ),
    "invalid UTF-8 in bytes": (pyarrow.array([b"a", b"\xe9"]), "row 2: column 'text' is not UTF-8"),
    "null": (
        pyarrow.array(["a", None], pyarrow.large_string()),
        "row 2: expected a text in column 'text', got a NoneType",
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_bad_row_is_named_or_left_out(tmp_path: Path, model: str, name: str) -> None:
    column, reason = COLUMNS[name]
    many = pyarrow.chunked_array([pyarrow.array(["b"] * 300).cast(column.type), column])
    pyarrow.parquet.write_table(pyarrow.table({"text": many}), tmp_path / "a.parquet", row_group_size=200)
    with pytest.raises(DataError, match=f"a.parquet: {reason.replace('row 2', 'row 302')}"):
        preprocess(options(tmp_path, model, tmp_path / "a.parquet"))
    report = preprocess(options(tmp_path, model, tmp_path / "a.parquet", max_bad_documents=1))
    assert report.datasets[0].documents == 301
    assert report.bad is not None and "1 bad documents left out, 0.33 % of 302" in report.bad


def test_a_bad_text_is_a_bad_document(tmp_path: Path, model: str) -> None:
    for name, content in (("a.txt", b"a"), ("b.txt", b"caf\xe9"), ("c.txt", "c".encode("utf-16"))):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    with pytest.raises(
        DataError, match=r"more than 1 bad documents \(--max-bad-documents\), the first is .*b\.txt: not UTF-8"
    ):
        preprocess(options(tmp_path, model, tmp_path / "data", max_bad_documents=1))
    assert preprocess(options(tmp_path, model, tmp_path / "data", max_bad_documents=2)).datasets[0].documents == 1


def test_workers_and_commands_count_alike(tmp_path: Path, model: str) -> None:
    """Several chunks, bad documents in each."""
    source = tmp_path / "a.jsonl"
    lines = [GOOD if i % 1000 else list(BAD_LINES.values())[i // 1000][0] for i in range(13_000)]
    source.write_bytes(b"\n".join(lines))
    reports = [
        preprocess(options(tmp_path, model, source, f"w{workers}", num_workers=workers, max_bad_documents=13))
        for workers in (1, 3)
    ]
    assert reports[0].bad == reports[1].bad is not None
    assert reports[0].bad.startswith(f"13 bad documents left out, 0.1 % of 13,000; the first is {source}:1: not a JSON")
    assert reports[0].bad in describe(reports[0], options(tmp_path, model, source), checksum=False)
    for suffix in (".bin", ".idx", ".json"):
        one, three = ((tmp_path / f"w{n}_text_document{suffix}").read_bytes() for n in (1, 3))
        assert one == three
    about = json.loads(one)
    assert (about["documents"], about["bad_documents"], about["bad_share"]) == (12_987, 13, 0.001)
    assert about["first_bad_document"].startswith(f"{source}:1: ")
    before = snapshot(tmp_path)
    for workers in (1, 3):
        with pytest.raises(DataError, match=rf"more than 12 bad documents .*, the first is {source}:1: "):
            preprocess(options(tmp_path, model, source, num_workers=workers, max_bad_documents=12))
    assert snapshot(tmp_path) == before


def test_the_commands_on_every_terminal(tmp_path: Path, model: str) -> None:
    (tmp_path / "é.jsonl").write_bytes(GOOD + b"\n" + '{"tëxt": 1}'.encode() + b"\n{}\n")
    data = ["--input", "é.jsonl", "--max-bad-documents"]
    tools = {
        "tools/preprocess_data.py": ["--output-prefix", "o", "--tokenizer-model", model, "--workers", "1"],
        "tools/train_tokenizer.py": ["--output", "u.model", "--vocab-size", "300"],
    }
    for script, arguments in tools.items():
        in_every_encoding(
            script, [*data, "1", *arguments], tmp_path, 3, "more than 1 bad doc.*jsonl:2: .*'text', got keys"
        )
        in_every_encoding(
            script, [*data, "-1", *arguments], tmp_path, 2, "--max-bad-documents: must be 0 or an integer above"
        )
