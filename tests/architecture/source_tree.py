"""What the architecture tests know of the sources: files, modules, imports, functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_sgt"
_SKIPPED_FOLDERS = {"__pycache__", ".git", ".venv", "build", "dist", "runs", "node_modules"}
_TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".sh", ".sbatch", ".in", ".cfg"}
_TEXT_NAMES = {"Makefile", "run", ".gitignore"}


@dataclass(frozen=True)
class Source:
    """One Python file: its path relative to the repository, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        """Dotted name: megatron_sgt/growth/__init__.py is megatron_sgt.growth."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def package(self) -> str:
        """The dotted name that a relative import starts from."""
        return self.module if self.path.endswith("__init__.py") else self.module.rpartition(".")[0]

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of everything imported anywhere, also inside functions and TYPE_CHECKING.

        `from a import b` yields a.b, because b may be a module; importlib.import_module("a") yields a.
        """
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node.lineno, alias.name
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parent = self.package.split(".")
                    parent = parent[: len(parent) - node.level + 1]
                    base = ".".join([*parent, base] if base else parent)
                for alias in node.names:
                    yield node.lineno, f"{base}.{alias.name}"
            elif isinstance(node, ast.Call) and _called_name(node) in ("import_module", "__import__"):
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    yield node.lineno, first.value

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method, nested ones too."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node

    def words_of_code(self) -> Iterator[tuple[int, str]]:
        """(line, text) of every name, attribute, argument and string, but not of docstrings and comments."""
        docstrings = {id(node) for node in self._docstring_nodes()}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name):
                yield node.lineno, node.id
            elif isinstance(node, ast.Attribute):
                yield node.lineno, node.attr
            elif isinstance(node, ast.arg | ast.keyword) and node.arg:
                yield node.lineno, node.arg
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield node.lineno, node.name
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield node.lineno, node.value
        yield from self.imports()

    def _docstring_nodes(self) -> Iterator[ast.expr]:
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield first.value


def _called_name(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            hidden = path.name.startswith(".") and path.name != ".ci"
            if path.name not in _SKIPPED_FOLDERS and not hidden and not path.name.endswith(".egg-info"):
                yield from _walk(path)
        else:
            yield path


def python_sources(folder: str = "") -> list[Source]:
    """All Python files below a folder of the repository ("": the whole repository)."""
    return [source_of(path) for path in _walk(ROOT / folder) if path.suffix == ".py"]


@cache
def source_of(path: Path) -> Source:
    """A file of the repository; it is parsed once for all rules (see conftest.py)."""
    return Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def text_files() -> list[tuple[str, str]]:
    """(path, text) of every file of the repository that a person reads."""
    paths = [path for path in _walk(ROOT) if path.suffix in _TEXT_SUFFIXES or path.name in _TEXT_NAMES]
    return [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]
