"""Heavy dependencies and devices stay inside the few files that may know of them."""

from __future__ import annotations

import ast

import pytest

from tests.architecture.source_tree import PACKAGE, Source, python_sources

# library -> beginnings of the paths (inside the package) that may import it
LIBRARY_HOMES = {
    "deepspeed": ("engine/", "compat/", "checkpoint/"),
    "transformers": ("export/hf/", "evaluation/", "data/tokenizer.py", "model/rotary.py"),
    "tokenizers": ("export/hf/", "evaluation/", "data/tokenizer.py", "data/special_tokens.py"),
    "mpi4py": ("launch/",),
    "matplotlib": ("reporting/",),
    "wandb": ("metrics/",),
    "tensorboard": ("metrics/",),
}
# config holds the word as the value of the option parallel.device.
# launch/job_environment.py sets variables that others have named.
CUDA_HOMES = ("parallel/device.py", "compat/", "ops/", "config/", "launch/job_environment.py")
# Megatron's name for its random states on whatever device there is.
NEUTRAL_NAME = "get_cuda_rng_tracker"


def inside(source: Source) -> str:
    return source.path.removeprefix(f"{PACKAGE}/")


def misplaced_libraries(source: Source) -> list[str]:
    wrong = []
    for line, name in source.imports():
        library = name.split(".")[0]
        triton = library == "triton" and not source.path.endswith("_triton.py")
        homes = LIBRARY_HOMES.get(library)
        if triton or (homes is not None and not inside(source).startswith(homes)):
            wrong.append(f"{source.path}:{line} imports {library}")
    return wrong


def misplaced_cuda(source: Source) -> list[str]:
    if inside(source).startswith(CUDA_HOMES):
        return []
    return [
        f"{source.path}:{line} says {word[:60]!r}"
        for line, word in source.words_of_code()
        if "cuda" in word.replace(NEUTRAL_NAME, "").lower()
    ]


def told_apart_by_name(source: Source) -> list[str]:
    """Comparisons of ``growth.method``: what a schedule does is asked of the schedule."""
    if inside(source).startswith(("config/", "growth/")):
        return []
    return [
        f"{source.path}:{node.lineno} compares {ast.unparse(side)}"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
        if ast.unparse(side).endswith("growth.method")
    ]


def test_growth_methods_are_not_told_apart_by_name() -> None:
    wrong = [line for source in python_sources(PACKAGE) for line in told_apart_by_name(source)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "text", "wrong"),
    [
        ("planning/plan.py", "if config.growth.method == 'sgt': ...", True),
        ("engine/run.py", "x = 'sgt' != self.config.growth.method", True),
        ("model/warm_up.py", "x = growth.method in ('sgt',)", True),
        ("growth/methods.py", "x = config.growth.method == 'sgt'", False),
        ("planning/memory.py", "x = config.parallel.loop_method == 'owner'", False),
    ],
)
def test_the_method_rule_sees_what_it_should(path: str, text: str, wrong: bool) -> None:
    assert bool(told_apart_by_name(Source(f"{PACKAGE}/{path}", text))) is wrong


def test_libraries_stay_at_home() -> None:
    wrong = [line for source in python_sources(PACKAGE) for line in misplaced_libraries(source)]
    assert not wrong, "\n".join(wrong)


def test_the_device_stays_at_home() -> None:
    wrong = [line for source in python_sources(PACKAGE) for line in misplaced_cuda(source)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "text", "wrong"),
    [
        ("engine/build.py", "import deepspeed", False),
        ("model/layer.py", "import deepspeed", True),
        ("model/layer.py", "def f():\n    from deepspeed.ops import adam", True),
        ("data/tokenizer.py", "from transformers import AutoTokenizer", False),
        ("export/to_hf.py", "import transformers", True),
        ("export/hf/modeling_sgt.py", "import transformers", False),
        ("ops/norm_triton.py", "import triton.language as tl", False),
        ("ops/norm.py", "import triton", True),
    ],
)
def test_the_library_rule_sees_what_it_should(path: str, text: str, wrong: bool) -> None:
    assert bool(misplaced_libraries(Source(f"{PACKAGE}/{path}", text))) is wrong


@pytest.mark.parametrize(
    ("path", "text", "wrong"),
    [
        ("model/layer.py", "x.cuda()", True),
        ("model/layer.py", "torch.cuda.synchronize()", True),
        ("engine/loop.py", "y = x.to('cuda:0')", True),
        ("engine/loop.py", "f(is_cuda=True)", True),
        ("engine/loop.py", "print(f'on CUDA {x}')", True),
        ("engine/loop.py", "from torch.cuda import Event", True),
        ("engine/loop.py", '"""Uses cuda streams."""\n# cuda\nx = 1', False),
        ("model/layer.py", "from megatron.core.tensor_parallel.random import get_cuda_rng_tracker", False),
        ("parallel/device.py", "torch.cuda.synchronize()", False),
        ("parallel/groups.py", "torch.cuda.synchronize()", True),
        ("compat/megatron_cpu.py", "torch.cuda.is_available()", False),
    ],
)
def test_the_device_rule_sees_what_it_should(path: str, text: str, wrong: bool) -> None:
    assert bool(misplaced_cuda(Source(f"{PACKAGE}/{path}", text))) is wrong


# Calls that open a text file or the output of a process; its encoding would be that of the locale.
TEXT_FUNCTIONS = {"open", "read_text", "write_text", "fdopen", "NamedTemporaryFile", "TemporaryFile"}
PROCESSES = {"run", "Popen", "check_output"}
NOT_OF_FILES = {"tokenize.open", "os.open", "gzip.open", "files.write_text", "write_text"}


def locale_encodings(source: Source) -> list[str]:
    """Text that is read or written in whatever encoding the locale has."""
    wrong = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) in NOT_OF_FILES:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        of_path = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) not in ("os", "io")
        place = 0 if of_path or name.endswith("File") else 1
        mode = given.get("mode") or (ast.unparse(node.args[place]) if len(node.args) > place else "'r'")
        is_text = name.endswith("_text") or (mode.startswith(("'", '"')) and "b" not in mode)
        if (name in TEXT_FUNCTIONS and is_text) or (name in PROCESSES and "text" in given):
            wrong += [] if "encoding" in given else [f"{source.path}:{node.lineno} {ast.unparse(node)[:80]}"]
    return wrong


def test_text_has_an_encoding() -> None:
    sources = [source for source in python_sources() if not source.path.startswith("tests/")]
    assert {"pretrain_sgt.py", "tools/study.py", f"{PACKAGE}/files.py"} <= {source.path for source in sources}
    wrong = [line for source in sources for line in locale_encodings(source)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, 'rb')", False),
        ("open(path, encoding='utf-8')", False),
        ("path.open('a')", True),
        ("path.open('ab')", False),
        ("path.read_text()", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("write_text(path, text)", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("os.fdopen(descriptor, 'w')", True),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, encoding='utf-8')", False),
        ("subprocess.run(command)", False),
    ],
)
def test_the_encoding_rule_sees_what_it_should(text: str, wrong: bool) -> None:
    assert bool(locale_encodings(Source(f"{PACKAGE}/a.py", text))) is wrong


def test_no_text_stands_alone() -> None:
    """Half of a message that is no part of it: a second f-string on a line of its own is a statement."""
    wrong = [
        f"{source.path}:{node.lineno}"
        for source in python_sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.JoinedStr)
    ]
    assert not wrong, wrong
