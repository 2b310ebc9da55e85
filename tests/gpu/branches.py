"""Finds what only a GPU executes: the functions of the project that ask which device they run on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEVICES = {"cpu", "cuda", "gpu", "nccl"}
"""Strings that a device, or what goes with it, is compared with."""
ASKING = {"runs_triton", "triton_installed", "interpreted", "pin_memory"}
"""Functions whose answer, or whose work, depends on the device or on what is installed for it."""


def places() -> list[str]:
    """``path:function`` of every such function, and ``path`` of every file of Triton kernels; sorted."""
    found = []
    for path in sorted((ROOT / "megatron_sgt").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if path.stem.endswith("_triton"):
            found.append(name)
        else:
            found += [f"{name}:{function}" for function in _functions(ast.parse(path.read_text()))]
    return found


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[str]:
    """Qualified names of functions that ask, the innermost one only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            name = f"{prefix}{node.name}"
            if isinstance(node, ast.FunctionDef) and any(map(_asks, _own_nodes(node))):
                yield name
            yield from _functions(node, f"{name}.")


def _own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Nodes of the body, without those of functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
            waiting += ast.iter_child_nodes(node)


def _asks(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        sides = (node.left, *node.comparators)
        return any(isinstance(side, ast.Constant) and side.value in DEVICES for side in sides)
    if isinstance(node, ast.Attribute):
        return ast.unparse(node).startswith(("torch.cuda.", "torch.version.hip"))
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return called in ASKING or any(
            word.arg in ("pin_memory", "pinned") and ast.unparse(word.value) != "False" for word in node.keywords
        )
    return False
