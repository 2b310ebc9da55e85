"""The pages about the code's structure are true: the table of layers, and every path that they name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.source_tree import PACKAGE, ROOT, python_sources
from tests.architecture.test_layers import LAYERS, TORCH_FREE

PAGES = ("README.md", "docs/design.md", "docs/where.md", "docs/extending.md", "tests/helpers/README.md")
IN_CODE = re.compile(r"`([^`\s]+)`")
PATH = re.compile(r"[\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|yaml|sh|txt|toml)")
MADE = ("runs/", "benchmarks/results/")
"""Folders that commands of the pages make."""
EXAMPLES = {"loss_average.py"}
"""Files of the reader's own that a page writes out."""


def table_of_layers() -> list[tuple[list[str], bool]]:
    """The rows of docs/design.md's first table: parts of the package, and whether torch is allowed."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    table = text[text.index("| part | what it owns | torch |") :].split("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return [(re.findall(r"`(\w+)`", row[0]), row[-1].strip() == "yes") for row in rows]


def test_the_table_names_every_part_in_the_order_of_the_layers() -> None:
    rows = table_of_layers()
    named = [part for parts, _ in rows for part in parts]
    assert sorted(named) == sorted(set(LAYERS) - {"__main__"})
    highest = -10
    for parts, _ in rows:
        for part in parts:
            assert LAYERS[part] >= highest, f"`{part}` stands above a part that it lies below"
        highest = max(LAYERS[part] for part in parts)


def test_the_table_says_which_parts_are_free_of_torch() -> None:
    assert {part for parts, torch in table_of_layers() for part in parts if not torch} == set(TORCH_FREE)


def test_no_docstring_numbers_the_layers() -> None:
    wrong = [source.path for source in python_sources(PACKAGE) if re.search(r"\(L\d\)", source.text)]
    assert not wrong, f"the order of the layers stands in docs/design.md: {wrong}"


def named_paths(text: str) -> Iterator[tuple[str, str]]:
    """(path, name in it or "") of what looks like a path of this repository in a page's inline code."""
    for word in IN_CODE.findall(text):
        path, _, name = word.partition(":")
        if PATH.fullmatch(path) and path not in EXAMPLES and not path.startswith(("/", "~", ".", *MADE)):
            yield path, name


def found(path: str) -> Path | None:
    """The file or folder that a page means."""
    places = [ROOT / path, ROOT / PACKAGE / path]
    return next((place for place in places if place.exists()), None)


def problem(path: str, name: str) -> str | None:
    place = found(path)
    if place is None:
        return f"{path} does not exist"
    if name and name not in defined_in(place):
        return f"{path} defines no {name}"
    return None


def defined_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    tables = (node.targets[0] for node in tree.body if isinstance(node, ast.Assign))
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)} | {
        target.id for target in tables if isinstance(target, ast.Name)
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [p for path, name in named_paths(text) if (p := problem(path, name))] == []


def test_where_answers_the_questions_of_a_newcomer() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", (ROOT / "docs/where.md").read_text(encoding="utf-8"), re.M)
    answers = [answer for question, answer in rows if question not in ("question", "---")]
    assert len(answers) >= 15 and all(list(named_paths(answer)) for answer in answers)


def test_the_reading_tour_is_short() -> None:
    tour = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Reading tour")[2].partition("\n## ")[0]
    stops = re.findall(r"^\d+\. `([^`]+)`", tour, re.M)
    lines = sum((ROOT / stop).read_text(encoding="utf-8").count("\n") for stop in stops)
    assert len(stops) <= 9 and 500 < lines <= 1400, f"{len(stops)} files, {lines} lines"


@pytest.mark.parametrize(
    ("word", "wrong"),
    [
        ("growth/gates.py:decay", False),
        ("growth/gates.py:fade", True),
        ("growth/gate.py", True),
        ("tools/plan.py", False),
        ("compat/", False),
    ],
)
def test_the_rule_of_paths_sees_what_it_should(word: str, wrong: bool) -> None:
    ((path, name),) = named_paths(f"see `{word}`.")
    assert bool(problem(path, name)) is wrong
