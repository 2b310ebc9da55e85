"""Heavy dependencies and devices stay inside the few files that may know of them."""

from __future__ import annotations

import ast

import pytest

from tests.architecture.source_tree import PACKAGE, Source, python_sources

# library -> beginnings of the paths (inside the package) that may import it
LIBRARY_HOMES = {
    "deepspeed": ("engine/", "compat/", "checkpoint/"),
    "transformers": ("export/hf/", "evaluation/", "data/tokenizer.py"),
    "tokenizers": ("export/hf/", "evaluation/", "data/tokenizer.py"),
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
