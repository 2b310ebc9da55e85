"""README.md names every helper, and no other; the lists of the suite name files that exist."""

import re
from pathlib import Path

import pytest

from tests.conftest import LONGEST, TESTS
from tests.helpers.exhaustive import exhaustive, share_of

HELPERS = Path(__file__).parent


def test_every_module_is_named_and_is_there() -> None:
    modules = {path.stem for path in HELPERS.glob("*.py") if not path.name.startswith("test_")}
    _, _, text = (HELPERS / "README.md").read_text(encoding="utf-8").partition("## All modules")
    named = {name for line in text.splitlines() if line.startswith("- ") for name in re.findall(r"`(\w+)`", line)}
    assert modules - named == set()
    assert named - modules - {"REQUIRED"} == set()


def test_the_longest_files_are_there() -> None:
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []


def test_a_share_and_the_rest_are_the_whole_matrix() -> None:
    cases = share_of([(1, "a"), (1, "b"), (2, "a")], [(1, "b")])
    marked = [case for case in cases if not isinstance(case, tuple) or hasattr(case, "marks")]
    assert [case.values for case in marked] == [(1, "a"), (2, "a")] and (1, "b") in cases
    assert [mark.name for mark in exhaustive("alone").marks] == ["exhaustive"]
    with pytest.raises(ValueError, match="not in the matrix"):
        share_of([1, 2], [3])
