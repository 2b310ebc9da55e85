"""Where colour and the progress bar appear, and that lines stay whole beside a bar."""

import io
import math
import re
import sys

import pytest

from megatron_sgt.metrics.console import ConsoleWriter
from megatron_sgt.metrics.lines import plain

TRAIN = {"step": 10, "train_iters": 40, "loss": 3.5, "eta_s": 90}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


def test_a_log_file_gets_plain_lines_and_no_bar() -> None:
    stream = io.StringIO()
    writer = ConsoleWriter(total_steps=40, stream=stream)
    writer.advance(5)
    writer.write("train", {**TRAIN, "loss": math.nan})
    writer.write("save", {"step": 10, "path": "p"})
    writer.close()
    assert stream.getvalue() == "step 10/40  25.0%  loss NaN  eta 1m30s\nSAVE  step 10  p\n"


def test_a_terminal_gets_colour(terminal: Terminal) -> None:
    ConsoleWriter(progress_bar="off", stream=terminal).write("train", {**TRAIN, "loss": math.nan})
    assert terminal.getvalue() == "step 10/40  25.0%  \x1b[1;31mloss NaN\x1b[0m  eta 1m30s\n"


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_can_be_refused(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    ConsoleWriter(progress_bar="off", stream=terminal).write("train", {**TRAIN, "loss": math.nan})
    assert "\x1b" not in terminal.getvalue()


def test_the_bar_stands_below_whole_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    writer = ConsoleWriter(total_steps=40, stream=terminal)
    writer.write("resume", {"step": 0})
    writer.write("train", TRAIN)
    writer.advance(11)
    writer.write("train", {**TRAIN, "step": 20, "loss": 2.5})
    writer.close()
    # What stays of a terminal line is what follows its last carriage return.
    shown = [line.rpartition("\r")[2].rstrip() for line in without_escapes(terminal.getvalue()).split("\n")]
    assert shown[:3] == [
        "START  fresh start",
        "step 10/40  25.0%  loss 3.500  eta 1m30s",
        "step 20/40  50.0%  loss 2.500  eta 1m30s",
    ]
    text = terminal.getvalue()
    assert " 25.0% |" in text and "10/40 steps, loss 3.500  eta 1m30s" in text
    assert "20/40 steps, loss 2.500" in text


def test_the_bar_starts_at_the_resumed_step_and_may_go_back(terminal: Terminal) -> None:
    writer = ConsoleWriter(total_steps=40, stream=terminal)
    writer.advance(30)
    assert " 75.0% |" in terminal.getvalue()
    terminal.truncate(0)
    writer.advance(20)
    assert " 50.0% |" in terminal.getvalue()
    writer.close()


def test_the_bar_ends_with_the_summary(terminal: Terminal) -> None:
    writer = ConsoleWriter(total_steps=40, stream=terminal)
    writer.advance(40)
    writer.write("summary", {"step": 40})
    end = len(terminal.getvalue())
    writer.advance(40)
    writer.close()
    assert terminal.getvalue()[end:] == ""
    assert without_escapes(terminal.getvalue()).endswith("DONE  step 40\n")


def test_bar_options_overrule_the_terminal(terminal: Terminal) -> None:
    file = io.StringIO()
    ConsoleWriter(progress_bar="on", total_steps=40, stream=file).advance(10)
    assert "10/40 steps" in file.getvalue()
    ConsoleWriter(progress_bar="off", total_steps=40, stream=terminal).advance(10)
    ConsoleWriter(total_steps=None, stream=terminal).advance(10)
    assert terminal.getvalue() == ""


def test_megatron_style_keeps_our_growth_lines(capsys: pytest.CaptureFixture[str]) -> None:
    writer = ConsoleWriter(style="megatron")
    writer.write("train", TRAIN)
    writer.write("growth", {"step": 10, "action": "fixed", "layer": None})
    assert capsys.readouterr().out == (
        " iteration       10/      40 | lm loss: 3.500000E+00 | number of skipped iterations:   0 | "
        "number of nan iterations:   0 |\nGROW  step 10  structure fixed: no layer loops\n"
    )


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"\['megatron', 'sgt'\], got 'neox'"):
        ConsoleWriter(style="neox")
    with pytest.raises(ValueError, match="got 'maybe'"):
        ConsoleWriter(progress_bar="maybe")


def test_plain_paint_changes_nothing() -> None:
    assert plain("bad", "x") == "x"
    assert ConsoleWriter(stream=sys.stdout) is not None
