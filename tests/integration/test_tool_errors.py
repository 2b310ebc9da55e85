"""Mistakes with the tools: one clear message, the documented exit code, nothing written or overwritten."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, run_script, snapshot

GOLDEN = str(ROOT / "tests" / "golden" / "a.safetensors")
TOKENIZE = ("--tokenizer-model", "sp.model", "--workers", "1")


@dataclass(frozen=True)
class Mistake:
    """`tools/<tool>.py arguments`, its exit code, and what stderr must hold: the user's value and the fix."""

    tool: str
    arguments: tuple[str, ...]
    code: int
    words: tuple[str, ...]


def usage(tool: str, *arguments: str, says: tuple[str, ...]) -> Mistake:
    return Mistake(tool, arguments, 2, says)


def data(tool: str, *arguments: str, says: tuple[str, ...]) -> Mistake:
    return Mistake(tool, arguments, 3, says)


MISTAKES = (
    usage("build_corpus", says=("required: --output",)),
    usage("build_corpus", "--output", "bad.jsonl/x", says=("--output: cannot write to bad.jsonl/x", "is a file")),
    usage("build_corpus", "--output", "new.jsonl", "--min-bytes", "-3", says=("--min-bytes", "above 0, got '-3'")),
    data("build_corpus", "--output", "bad.jsonl", says=("bad.jsonl exists already", "give --overwrite")),
    data("build_corpus", "--output", "new.jsonl", "--min-bytes", "9" * 12, says=("fewer than 999,999,999,999",)),
    usage("train_tokenizer", "--input", "good.jsonl", "--vocab-size", "300", says=("required: --output",)),
    usage("train_tokenizer", "--input", "good.jsonl", "--output", "new", "--vocab-size", "100",
          says=("--vocab-size: 100", "259 fixed ids")),
    usage("train_tokenizer", "--input", "good.jsonl", "--output", "new", "--vocab-size", "many",
          says=("--vocab-size", "'many'")),
    data("train_tokenizer", "--input", "nope", "--output", "new", "--vocab-size", "300", says=("nope does not exist",)),
    data("train_tokenizer", "--input", "bad.jsonl", "--output", "new", "--vocab-size", "300",
         says=("bad.jsonl:2: not a JSON line", "one object")),
    data("train_tokenizer", "--input", "empty", "--output", "new", "--vocab-size", "300",
         says=("no input files in empty", "--input-format")),
    data("train_tokenizer", "--input", "good.jsonl", "--output", "new", "--vocab-size", "99999",
         says=("vocabulary of 99999", "value <=")),
    data("train_tokenizer", "--input", "good.jsonl", "--output", "sp.model", "--vocab-size", "300",
         says=("sp.model exists already", "give --overwrite")),
    usage("preprocess_data", "--input", "good.jsonl", "--output-prefix", "new", says=("required: --tokenizer-model",)),
    usage("preprocess_data", "--input", "good.jsonl", "--output-prefix", "sp.model/new", *TOKENIZE,
          says=("--output-prefix: cannot write to sp.model/new", "is a file")),
    usage("preprocess_data", "--input", "good.jsonl", "--output-prefix", "new", *TOKENIZE, "--workers", "0",
          says=("--workers must be at least 1, got 0",)),
    data("preprocess_data", "--input", "nope", "--output-prefix", "new", *TOKENIZE, says=("nope does not exist",)),
    data("preprocess_data", "--input", "bad.jsonl", "--output-prefix", "new", *TOKENIZE,
         says=("bad.jsonl:2: not a JSON line", "one object")),
    data("preprocess_data", "--input", "good.jsonl", "--output-prefix", "new", *TOKENIZE, "--json-keys", "body",
         says=("good.jsonl:1", "'body'", "['text']", "--json-keys")),
    data("preprocess_data", "--input", "latin.txt", "--output-prefix", "new", *TOKENIZE,
         says=("latin.txt: not UTF-8 text", "convert it or leave it out")),
    data("preprocess_data", "--input", "good.jsonl", "--output-prefix", "old", *TOKENIZE,
         says=("old_text_document.bin", "exists already", "give --overwrite")),
    data("preprocess_data", "--input", "good.jsonl", "--output-prefix", "new", "--tokenizer-model", "nope.model",
         says=("nope.model does not exist", "tools/train_tokenizer.py")),
    data("preprocess_data", "--input", "good.jsonl", "--output-prefix", "new", "--tokenizer-model", "good.jsonl",
         says=("good.jsonl is not a sentencepiece model", "data.tokenizer.type")),
    usage("replay_trajectory", GOLDEN, says=("required: --out",)),
    usage("replay_trajectory", GOLDEN, "--out", "sp.model/new", says=("--out: cannot write to sp.model/new",)),
    usage("replay_trajectory", GOLDEN, "--out", "new", "--pipeline-parallel", "9", says=("9 needs a layer for",)),
    usage("replay_trajectory", GOLDEN, "--out", "new", "--tensor-parallel", "3", says=("4 is not a multiple of",)),
    usage("replay_trajectory", GOLDEN, "--out", "new", "--micro-batch", "3", says=("8 is not a multiple of",)),
    data("replay_trajectory", "nope", "--out", "new", says=("nope is not a trajectory file", "No such file")),
    data("replay_trajectory", "good.jsonl", "--out", "new", says=("good.jsonl is not a trajectory file",)),
    data("summarize_run", "nope", says=("nope/metrics.jsonl", "No such file")),
    usage("bench/step_overhead", "--loop-heads", "99", says=("--loop-heads: 99 is above --heads 8",)),
    usage("bench/step_overhead", "--heads", "7", says=("hidden_size 512 is not a multiple of num_attention_heads 7",)),
    usage("bench/step_overhead", "--pairs", "0", says=("--pairs", "above 0, got '0'")),
)  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad texts, a tokenizer, a data set."""
    path = tmp_path_factory.mktemp("tools") / "template"
    (path / "empty").mkdir(parents=True)
    (path / "good.jsonl").write_text('{"text": "the quick brown fox"}\n' * 50)
    (path / "bad.jsonl").write_text('{"text": "good"}\n{"text": "cut off\n')
    (path / "latin.txt").write_bytes(b"caf\xe9")
    train = ["--input", "good.jsonl", "--output", "sp.model", "--vocab-size", "280"]
    tokenize = ["--input", "good.jsonl", "--output-prefix", "old", *TOKENIZE]
    for tool, arguments in (("train_tokenizer", train), ("preprocess_data", tokenize)):
        done = run_script(f"tools/{tool}.py", arguments, path)
        assert done.code == 0, done.err
    return path


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: " ".join((m.tool, *m.arguments))[:80])
def test_mistake(mistake: Mistake, template: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(template, tmp_path / "user"))
    before = snapshot(folder)
    done = run_script(f"tools/{mistake.tool}.py", list(mistake.arguments), folder)
    assert done.code == mistake.code, done.err
    assert done.err.count("error: ") == 1 and "Traceback" not in done.err and done.out == "", done.err
    missing = [word for word in mistake.words if word not in done.err]
    assert not missing, f"{missing} not in: {done.err}"
    assert snapshot(folder) == before
