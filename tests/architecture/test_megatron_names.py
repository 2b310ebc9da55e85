"""Every name of Megatron-Core that the package uses stands in the table of docs/design.md, and nothing else does.

A name more is one thing more that a new version can take away, so it is added on purpose, with its reason.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator

import pytest

from tests.architecture.source_tree import PACKAGE, ROOT, Source, python_sources

CORE = "megatron.core"


def used_names(source: Source) -> Iterator[str]:
    """Names below megatron.core; of a module, its attributes that are used, or itself if it is only handed on."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "megatron")
        elif isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{CORE}."):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                attributes = list(_attributes(source, alias.asname or alias.name)) if _is_module(full) else []
                for name in [f"{full}.{attribute}" for attribute in attributes] or [full]:
                    yield name.removeprefix(f"{CORE}.")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def _attributes(source: Source, local: str) -> Iterator[str]:
    for node in ast.walk(source.tree):
        of_it = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == local
        if of_it and not node.attr.startswith("__"):
            yield node.attr


def documented_names(text: str) -> set[str]:
    """First two columns of the table: a module in backticks, then its names, or none if it is handed on whole."""
    _, _, section = text.partition("## Seams of Megatron-Core")
    names: set[str] = set()
    for module, cell in re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|", section.split("\n## ")[0], flags=re.MULTILINE):
        found = re.findall(r"`([\w.]+)`", cell)
        names |= {f"{module}.{name}".removeprefix(f"{CORE}.") for name in found} or {module}
    return names


def test_the_table_of_seams_is_complete() -> None:
    used = {name for source in python_sources(PACKAGE) for name in used_names(source)}
    documented = documented_names((ROOT / "docs/design.md").read_text(encoding="utf-8"))
    assert used - documented == set(), "used, but not in the table of docs/design.md"
    assert documented - used == set(), "in the table of docs/design.md, but not used"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("from megatron.core.models.gpt import GPTModel", ["models.gpt.GPTModel"]),
        (
            "def f():\n    from megatron.core.transformer import TransformerConfig as T",
            ["transformer.TransformerConfig"],
        ),
        ("from megatron.core import parallel_state as p\np.a(p.b)", ["parallel_state.a", "parallel_state.b"]),
        ("from megatron.core import parallel_state\nf(parallel_state)", ["parallel_state"]),
        ("import megatron.core.utils", ["megatron.core.utils"]),
        ("import torch\nfrom megatron_sgt.model import layer", []),
    ],
)
def test_the_rule_sees_what_it_should(text: str, names: list[str]) -> None:
    assert sorted(used_names(Source(f"{PACKAGE}/x.py", text))) == names


def test_the_table_is_read_row_by_row() -> None:
    rows = "| `a.b` | `C`, `d` | why |\n| `e.f` | the module | why |\n"
    text = f"## Seams of Megatron-Core\n\n{rows}\n## Next\n| `g` | `h` | |"
    assert documented_names(text) == {"a.b.C", "a.b.d", "e.f"}
