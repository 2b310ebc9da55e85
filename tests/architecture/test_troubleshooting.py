"""docs/troubleshooting.md cannot rot: each of its messages is one that the sources can say, with that exit code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from megatron_sgt.errors import ExitCode
from tests.architecture.source_tree import PACKAGE, ROOT, python_sources

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
VALUE = "\0"
"""Stands in a template for a value that is filled in."""
CODES = {
    "ConfigError": ExitCode.CONFIG,
    "DataError": ExitCode.DATA,
    "CheckpointError": ExitCode.CHECKPOINT,
    "DivergedError": ExitCode.CRASH,
    "CorruptionError": ExitCode.CRASH,
    "PlanMismatchError": ExitCode.CRASH,
}


def text_of(node: ast.expr) -> str:
    """The text of a string or f-string; VALUE for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else VALUE for part in node.values)
    return VALUE


def templates() -> Iterator[tuple[str, ExitCode | None]]:
    """Every text in the sources, with the exit code of the exception that it is raised with, None if not known."""
    for source in python_sources(PACKAGE):
        known: dict[int, ExitCode] = {}
        for node in ast.walk(source.tree):
            raised = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and CODES.get(node.func.id)
            if raised:
                known |= {id(inner): raised for inner in ast.walk(node)}
        for node in ast.walk(source.tree):
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                yield text_of(node), known.get(id(node))


def messages(page: str) -> list[tuple[str, int]]:
    """(message, exit code of its section) of every heading."""
    found, code = [], -1
    for line in page.splitlines():
        if line.startswith("## "):
            code = int(re.search(r"exit code (\d+)", line)[1])  # type: ignore[index]
        elif line.startswith("### "):
            found.append((line.removeprefix("### ").strip("`"), code))
    return found


def can_say(template: str, message: str) -> bool:
    """Whether the literal parts of ``message`` stand in ``template`` in their order, with no value inside."""
    place = 0
    for part in re.split(r"<[^>]*>", message):
        place = template.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


TEMPLATES = list(templates())


@pytest.mark.parametrize(("message", "code"), messages(PAGE))
def test_the_message_can_be_said_with_that_exit_code(message: str, code: int) -> None:
    codes = [known for template, known in TEMPLATES if can_say(template, message)]
    assert codes, f"nothing in {PACKAGE} says {message!r}"
    assert None in codes or code in codes, f"{message!r} ends with {codes}, not {code}"


def test_the_page_is_not_short_and_names_each_message_once() -> None:
    found = [message for message, _ in messages(PAGE)]
    assert len(found) == len(set(found)) >= 30


def test_the_rule_sees_what_it_should() -> None:
    template = text_of(ast.parse('f"cannot listen on {port}: another" " program"', mode="eval").body)
    assert can_say(template, "cannot listen on <port>: another program")
    assert can_say(template, "another program")
    assert not can_say(template, "cannot listen on 7: another program")
    assert not can_say(template, "another program: cannot listen")
