"""Preprocessing that is killed at any moment and goes on: the same bytes as without."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.config import TokenizerConfig
from megatron_sgt.data import resume, writer
from megatron_sgt.data.preprocess import PreprocessOptions, preprocess
from megatron_sgt.data.resume import Journal, Mark, Origin
from megatron_sgt.errors import DataError
from tests.helpers.exhaustive import exhaustive
from tests.helpers.hf_tokenizers import bert

KILLED = 9


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three chunks of lines, with a bad document in each."""
    monkeypatch.setattr("megatron_sgt.data.readers.CHUNK_DOCUMENTS", 4)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a process is killed here, not a machine
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"layer {i}", "title": "head" * (i % 2)}) for i in range(10)]
    lines[1] = lines[5] = lines[-1] = "bad"
    path.write_text("\n".join(lines))
    return path


def options(source: Path, sp_model: str, prefix: Path, **changes: Any) -> PreprocessOptions:
    fields = {"json_keys": ("text", "title"), "max_bad_documents": 3, "resume": True, **changes}
    tokenizer = fields.pop("tokenizer", TokenizerConfig(type="sentencepiece", model=sp_model))
    return PreprocessOptions((str(source),), str(prefix), tokenizer, **fields)


def in_a_fork(work: Callable[[], object]) -> int:
    """The exit code of a process that does ``work``, without any clean-up after a death."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying(at: int, work: Callable[[], object]) -> Callable[[], None]:
    """Does ``work`` and dies before the ``at``-th of its steps at the files."""
    left = at

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(KILLED)
            return function(*arguments, **named)

        return call

    def run() -> None:
        for owner, name in (
            (os, "replace"), (os, "fsync"), (os, "open"), (Path, "unlink"), (writer.DatasetWriter, "add"),
            (writer.DatasetWriter, "_finish"),
        ):  # fmt: skip
            setattr(owner, name, counted(getattr(owner, name)))
        work()

    return run


@pytest.mark.parametrize("every", [4, exhaustive(1)])
def test_killed_at_every_step(
    tmp_path: Path,
    sp_model: str,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    every: int,
) -> None:
    monkeypatch.setattr(resume, "SAVE_EVERY_SECONDS", 0.0)
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = preprocess(options(source, sp_model, whole / "x"))
    names = sorted(path.name for path in whole.iterdir())
    assert names == [f"x_{key}_document{suffix}" for key in ("text", "title") for suffix in (".bin", ".idx", ".json")]
    again = options(source, sp_model, out / "x")
    step, code = 0, KILLED
    while code == KILLED:
        shutil.rmtree(out, ignore_errors=True)
        code = in_a_fork(dying(step, lambda: preprocess(again)))
        if code == KILLED:
            report = preprocess(again)
            assert [(d.tokens, d.empty) for d in report.datasets] == [(d.tokens, d.empty) for d in expected.datasets]
            assert report.kept or report.bad == expected.bad
        assert sorted(path.name for path in out.iterdir()) == names, step
        for name in names:
            assert (out / name).read_bytes() == (whole / name).read_bytes(), (step, name)
        step += every
    assert code == 0 and step > 40
    assert "goes on at" in capfd.readouterr().err


def test_killed_again_and_again(tmp_path: Path, sp_model: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that replaces a data set, killed without --resume; each process that goes on comes a step further."""
    monkeypatch.setattr(resume, "SAVE_EVERY_SECONDS", 0.0)
    preprocess(options(source, sp_model, tmp_path / "whole" / "x"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x_text_document.bin").write_text("an old one")
    first = options(source, sp_model, tmp_path / "out" / "x", overwrite=True, resume=False)
    others = options(source, sp_model, tmp_path / "out" / "x")
    assert in_a_fork(dying(12, lambda: preprocess(first))) == KILLED
    codes = []
    while not codes or codes[-1] == KILLED:
        codes.append(in_a_fork(dying(10 + len(codes), lambda: preprocess(others))))
    assert codes[-1] == 0 and len(codes) > 5
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_what_has_changed_is_named(tmp_path: Path, sp_model: str, source: Path) -> None:
    unfinished, finished = tmp_path / "u", tmp_path / "f"
    preprocess(options(source, sp_model, finished))
    with pytest.raises(DataError, match="more than 2 bad"):
        preprocess(options(source, sp_model, unfinished, max_bad_documents=2))
    assert Path(f"{unfinished}.resume").exists(), "an error leaves what there is"
    for changes, message in (
        ({"append_eod": True}, "--append-eod was false and is true now"),
        ({"json_keys": ("text",)}, "--json-keys was text, title and is text now"),
        ({"tokenizer": TokenizerConfig.at(bert(tmp_path / "bert"))}, "the tokenizer was "),
    ):
        for prefix, fix in ((unfinished, "start again without --resume"), (finished, "give --overwrite")):
            with pytest.raises(DataError, match=f"{message}.*{fix}"):
                preprocess(options(source, sp_model, prefix, **changes))
    assert preprocess(options(source, sp_model, finished, num_workers=1, max_bad_documents=9)).kept
    os.utime(source, (1, 1))
    for prefix in (unfinished, finished):
        with pytest.raises(DataError, match=r"a\.jsonl has changed since"):
            preprocess(options(source, sp_model, prefix))
    without = preprocess(options(source, sp_model, unfinished, resume=False))
    assert (
        without.resumed_tokens == 0 and not list(tmp_path.glob("u*.tmp")) and not Path(f"{unfinished}.resume").exists()
    )
    with pytest.raises(DataError, match="nothing says what it was made from"):
        preprocess(options(source, sp_model, unfinished))


def test_changes_of_inputs() -> None:
    was = Origin({"a": 1}, [["x", "jsonl", 5, 7], ["y", "text", 5, 7]])
    assert was.change(was) is None
    for inputs, message in (
        ([["x", "jsonl", 5, 7]], "y is no longer among the inputs"),
        ([*was.inputs, ["z", "text", 1, 1]], "z is a new input"),
        (was.inputs[::-1], "the inputs are in another order"),
        ([["x", "text", 5, 7], was.inputs[1]], "x has changed since"),
    ):
        assert was.change(Origin({"a": 1}, inputs)) == message
    assert was.change(Origin({"a": "b" * 64}, was.inputs)) == f'a was 1 and is "{"b" * 11}… now'


def test_a_damaged_journal(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "x"), Origin({}, []), overwrite=False)
    assert journal.read() is None
    mark = Mark((writer.Written(1, 2, 3),), resume.Position(0, 5, 2), 7, 1, 1, resume.BadDocument("a:1", "why"))
    journal.save(mark)
    assert journal.read() == mark
    journal.path.write_text("{}")
    with pytest.raises(DataError, match=r"x.resume is damaged: .*start again without --resume"):
        journal.read()
