"""Sizes, docstrings, words, and the mirror between modules and tests."""

from __future__ import annotations

import ast
import re

import pytest

from tests.architecture.source_tree import PACKAGE, ROOT, Source, python_sources, text_files

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# Smaller modules may be tested through their users.
MIRROR_FROM_LINES = 20
# Modules whose tests stand under another name: module path -> test path.
MIRROR_ELSEWHERE: dict[str, str] = {
    "megatron_sgt/arch/kernels.py": "tests/planning/test_memory.py",
    "megatron_sgt/stages/operators/__init__.py": "tests/stages/test_stages.py",
    "megatron_sgt/stages/operators/auto_prog.py": "tests/stages/test_growth.py",
    "megatron_sgt/stages/operators/compound_grow.py": "tests/stages/test_maps.py",
    "megatron_sgt/stages/operators/g_stack.py": "tests/stages/test_growth.py",
    "megatron_sgt/stages/operators/grad_stack.py": "tests/stages/test_growth.py",
    "megatron_sgt/stages/operators/lidas.py": "tests/stages/test_growth.py",
    "megatron_sgt/stages/operators/midas.py": "tests/stages/test_growth.py",
    "megatron_sgt/stages/operators/msg.py": "tests/stages/test_maps.py",
    "megatron_sgt/model/kept_weights.py": "tests/model/test_balanced_loop.py",
    "megatron_sgt/model/linear.py": "tests/model/test_balanced_loop.py",
    "megatron_sgt/ops/loop_projection_triton.py": "tests/ops/test_loop_projection.py",
    "megatron_sgt/ops/loop_projection_backward_triton.py": "tests/ops/test_loop_projection.py",
    "megatron_sgt/ops/loop_attention_sums_triton.py": "tests/ops/test_loop_attention.py",
    "megatron_sgt/ops/loop_attention_triton.py": "tests/ops/test_loop_attention.py",
    "megatron_sgt/ops/loop_attention_backward_triton.py": "tests/ops/test_loop_attention.py",
    "megatron_sgt/ops/entropy_triton.py": "tests/ops/test_entropy.py",
    "megatron_sgt/data/changes.py": "tests/edges/test_resume_changes.py",
    "megatron_sgt/data/history.py": "tests/edges/test_resume_changes.py",
    "megatron_sgt/growth/identity.py": "tests/growth/test_schedule.py",
    "megatron_sgt/reporting/curves.py": "tests/reporting/test_report.py",
    "megatron_sgt/reporting/page.py": "tests/reporting/test_report.py",
    "megatron_sgt/reporting/structure.py": "tests/reporting/test_report.py",
    "megatron_sgt/reporting/style.py": "tests/reporting/test_report.py",
}

# Joined here, so that this file does not hold them. Six X's of a mktemp template are no mark.
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b")
MACHINE_PATH = re.compile(r"(?<![\w.-])/(" + "wo" + r"rk|tm" + r"p/w)(?![\w-])")

# Docstrings write names as ``name``, and exceptions as a block: "Raises:", then "Name: when" lines.
SINGLE_BACKTICK = re.compile(r"(?<![`\\\w])`(?!`)[^`\n]+`(?!`)")
INLINE_RAISES = re.compile(r"\b[Rr]aises [A-Z]\w+")


def long_files(source: Source) -> list[str]:
    count = source.text.count("\n")
    return [f"{source.path}: {count} lines"] if count > MAX_FILE_LINES else []


def long_functions(source: Source) -> list[str]:
    return [
        f"{source.path}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in source.functions()
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def undocumented(source: Source) -> list[str]:
    """The module, its public classes and its public functions that have no docstring."""
    wrong = [] if ast.get_docstring(source.tree) else [f"{source.path}: module"]
    for node in source.tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if not node.name.startswith("_") and not ast.get_docstring(node):
            wrong.append(f"{source.path}:{node.lineno} {node.name}")
    return wrong


def foreign_dialect(source: Source) -> list[str]:
    """Single backticks around a name, and exceptions inside the prose, in any docstring."""
    return [
        f"{source.path}:{node.body[0].lineno} {match.group()!r}"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for pattern in (SINGLE_BACKTICK, INLINE_RAISES)
        if (match := pattern.search(ast.get_docstring(node) or ""))
    ]


def bad_words(path: str, text: str) -> list[str]:
    return [
        f"{path}:{number} {match.group()!r}"
        for number, line in enumerate(text.split("\n"), start=1)
        for pattern in (UNFINISHED, MACHINE_PATH)
        if (match := pattern.search(line))
    ]


def mirror_of(path: str) -> str:
    """megatron_sgt/data/loader.py -> tests/data/test_loader.py; a package's __init__ -> test_<package>.py."""
    folder, _, name = path.removeprefix(f"{PACKAGE}/").rpartition("/")
    stem = name.removesuffix(".py")
    if stem == "__init__":
        stem = folder.rpartition("/")[2]
    return "/".join(part for part in ("tests", folder, f"test_{stem}.py") if part)


def has_code(source: Source) -> bool:
    """False for a module of imports, names and docstrings only, such as a package's table of contents."""
    return any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node in ast.walk(source.tree)
    )


def test_files_are_short() -> None:
    wrong = [line for source in python_sources() for line in long_files(source)]
    assert not wrong, "\n".join(wrong)


def test_functions_are_short() -> None:
    wrong = [line for source in python_sources() for line in long_functions(source)]
    assert not wrong, "\n".join(wrong)


def test_public_names_are_documented() -> None:
    wrong = [line for source in python_sources(PACKAGE) for line in undocumented(source)]
    assert not wrong, "\n".join(wrong)


def test_docstrings_have_one_dialect() -> None:
    sources = [source for source in python_sources() if not source.path.startswith("tests/")]
    assert {"pretrain_sgt.py", "tools/plan.py", f"{PACKAGE}/errors.py"} <= {source.path for source in sources}
    wrong = [line for source in sources for line in foreign_dialect(source)]
    assert not wrong, "\n".join(wrong)


def test_no_unfinished_marks_and_no_machine_paths() -> None:
    files = text_files()
    assert {"setup.py", "Makefile", ".ci/run", f"{PACKAGE}/errors.py"} <= {path for path, _ in files}
    wrong = [line for path, text in files for line in bad_words(path, text)]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_its_test() -> None:
    missing = []
    for source in python_sources(PACKAGE):
        if source.text.count("\n") <= MIRROR_FROM_LINES or not has_code(source):
            continue
        test = MIRROR_ELSEWHERE.get(source.path, mirror_of(source.path))
        if not (ROOT / test).exists():
            missing.append(f"{source.path} -> {test}")
    assert not missing, "\n".join(missing)


def test_the_table_of_mirrors_is_true() -> None:
    stale = [path for pair in MIRROR_ELSEWHERE.items() for path in pair if not (ROOT / path).exists()]
    assert not stale, f"MIRROR_ELSEWHERE names what does not exist: {stale}"


def test_the_size_rules_see_what_they_should() -> None:
    body = "\n".join(["def f():"] + ["    x = 1"] * MAX_FUNCTION_LINES) + "\n"
    assert long_functions(Source("a.py", body)) == ["a.py:1 f: 61 lines"]
    assert long_functions(Source("a.py", body.replace("    x = 1\n", "", 1))) == []
    assert long_files(Source("a.py", "\n" * 401)) == ["a.py: 401 lines"]
    assert long_files(Source("a.py", "\n" * 400)) == []


def test_the_docstring_rule_sees_what_it_should() -> None:
    source = Source("a.py", '"""Doc."""\ndef _private(): pass\ndef f(): pass\nclass C: pass\n')
    assert undocumented(source) == ["a.py:3 f", "a.py:4 C"]
    assert undocumented(Source("a.py", "x = 1")) == ["a.py: module"]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("The ``name`` of a file.", False),
        ("The `name` of a file.", True),
        ("The :class:`Name` of a file.", True),
        ("Read it.\n\nRaises:\n    DataError: it is damaged.", False),
        ("Read it. Raises DataError when it is damaged.", True),
        ("Read it; raises DataError for damage.", True),
        ("A rank that raises is named; it raises ``DataError``.", False),
    ],
)
def test_the_dialect_rule_sees_what_it_should(text: str, wrong: bool) -> None:
    for code in (f'"""{text}"""\n', f'class C:\n    def f(self):\n        """{text}"""\n'):
        assert bool(foreign_dialect(Source("a.py", code))) is wrong
    assert foreign_dialect(Source("a.py", f"x = 1  # {text!r}\n")) == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("# TO" + "DO: later", True),
        ("x = 1  # FIX" + "ME", True),
        ("# X" + "XX", True),
        ("mktemp -d folder." + "X" * 6, False),
        ("see /wo" + "rk/main/setup.py", True),
        ("see /tm" + "p/w/venv", True),
        ("see /tm" + "p/workdir", False),
        ("see https://example.org/a/wo" + "rk", False),
        ("data/wo" + "rk/x and TODOS", False),
    ],
)
def test_the_word_rule_sees_what_it_should(line: str, wrong: bool) -> None:
    assert bool(bad_words("a", line)) is wrong


@pytest.mark.parametrize(
    ("path", "test"),
    [
        ("megatron_sgt/data/loader.py", "tests/data/test_loader.py"),
        ("megatron_sgt/errors.py", "tests/test_errors.py"),
        ("megatron_sgt/growth/__init__.py", "tests/growth/test_growth.py"),
        ("megatron_sgt/export/hf/modeling_sgt.py", "tests/export/hf/test_modeling_sgt.py"),
    ],
)
def test_mirror_of(path: str, test: str) -> None:
    assert mirror_of(path) == test
