import gzip
import json
from pathlib import Path

import pytest

from megatron_sgt.config import TokenizerConfig
from megatron_sgt.data.inputs import find_inputs
from megatron_sgt.data.tokenizer import build_tokenizer
from megatron_sgt.data.train_tokenizer import PIECE_CHARACTERS, pieces, sample_documents, train_tokenizer
from megatron_sgt.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> str:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(tmp_path / "a.jsonl")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_round_trip_and_repeatable(
    corpus: str, tmp_path: Path, texts: list[str], model_type: str, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / name) for name in ("a.model", "b.model")]
    for path in paths:
        report = train_tokenizer([corpus], path, 310, model_type=model_type)  # type: ignore[arg-type]
    assert Path(paths[0]).read_bytes() == Path(paths[1]).read_bytes()
    assert (report.vocab_size, report.documents) == (310, len(texts))
    assert capfd.readouterr().err == "", "sentencepiece prints nothing"
    tokenizer = build_tokenizer(TokenizerConfig(type="sentencepiece", model=paths[0]))
    for text in [*texts, "  indented\n\n\tcode \x00 \ufeff ﬁ ① Å\r\n", "ÅÅ é é"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert report.bytes_per_token == pytest.approx(num_bytes / num_tokens)
    assert report.bytes_per_token > 1.5


def test_sample_is_even_and_repeatable(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{i:06d}" + "x" * 94}) + "\n" for i in range(5000)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    files = find_inputs([str(tmp_path / "a.jsonl")]).files
    sample = sample_documents(files, "text", 100_000, seed=1).documents
    assert sample == sample_documents(files, "text", 100_000, seed=1).documents
    assert sample != sample_documents(files, "text", 100_000, seed=2).documents
    numbers = [int(text[:6]) for text in sample]
    assert numbers == sorted(numbers)
    assert 700 < len(sample) < 1050
    assert 2200 < sum(numbers) / len(numbers) < 2800, "taken from the whole corpus, not from its beginning"
    assert len(sample_documents(files, "text", 10**9, seed=1).documents) == 5000


def test_a_sample_that_is_full_early_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text of small files that shrinks much more than is assumed: the last of them are not looked at."""
    line = json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 40}) + "\n"
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(line.encode() * 6000))
    train_tokenizer([str(tmp_path)], str(tmp_path / "x.model"), 290, sample_bytes=100_000)
    assert "the sample was full before the last " in capsys.readouterr().err


def test_pieces_lose_nothing() -> None:
    documents = ["a\n" * 5000, "x" * 9001, "", "one line", "\r\n\u2028"]
    cut = list(pieces(documents))
    assert "".join(cut) == "".join(documents)
    assert max(map(len, cut)) <= PIECE_CHARACTERS
    assert all(piece.endswith("\n") for piece in cut[:2])


def test_mistakes(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocabulary of 100000 on this text: Vocabulary size too high"):
        train_tokenizer([corpus], str(tmp_path / "x.model"), 100_000)
    with pytest.raises(DataError, match="vocabulary of 10 "):
        train_tokenizer([corpus], str(tmp_path / "x.model"), 10)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"no text to train .*empty\.txt"):
        train_tokenizer([str(tmp_path / "empty.txt")], str(tmp_path / "x.model"), 300)
    assert not (tmp_path / "x.model").exists()
    (tmp_path / "x.model").write_text("mine")
    with pytest.raises(DataError, match="--overwrite"):
        train_tokenizer([corpus], str(tmp_path / "x.model"), 300)
