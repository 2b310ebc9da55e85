"""Imports point one way: a module imports lower layers and its own package, nothing else of the project."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.architecture.source_tree import PACKAGE, ROOT, Source, python_sources

# Lower numbers are imported by higher ones. errors, cli which reports them, extensions and the format of metrics.jsonl
# are below everything.
LAYERS = {
    "errors": -3,
    "files": -3,
    "paths": -3,
    "streams": -3,
    "cli": -2,
    "lease": -2,
    "extensions": -2,
    "jsonl": -2,
    "config": -1,
    "arch": 0,
    "growth": 1,
    "ops": 1,
    "compat": 1,
    "launch": 1,
    "stages": 2,
    "parallel": 2,
    "metrics": 2,
    "planning": 3,
    "data": 3,
    "optim": 3,
    "model": 4,
    "checkpoint": 5,
    "evaluation": 5,
    "guard": 5,
    "reporting": 5,
    "preflight": 6,
    "export": 7,
    "engine": 7,
    "submit": 7,
    "__main__": 8,
}
TORCH_FREE = (
    "errors",
    "files",
    "paths",
    "streams",
    "cli",
    "extensions",
    "jsonl",
    "lease",
    "config",
    "arch",
    "growth",
    "stages",
    "launch",
    "metrics",
    "planning",
    "preflight",
    "reporting",
    "submit",
)
TORCH_NAMES = ("torch", "deepspeed", "megatron", "transformers", "triton")


def part_of(module: str) -> str:
    """The part of the project that a dotted name belongs to; "" for the project's top itself."""
    return module.split(".")[1] if module.startswith(f"{PACKAGE}.") else ""


def wrong_imports(source: Source) -> list[str]:
    """What `source` imports from its own layer or above."""
    own = part_of(source.module)
    wrong = []
    for line, name in source.imports():
        if not name.startswith(f"{PACKAGE}."):
            continue
        other = part_of(name)
        # `from megatron_sgt import __version__` names no part.
        if other not in LAYERS or other == own:
            continue
        if not own or LAYERS[other] >= LAYERS[own]:
            wrong.append(f"{source.path}:{line} imports {name}")
    return wrong


def torch_imports(source: Source) -> list[str]:
    return [
        f"{source.path}:{line} imports {name}" for line, name in source.imports() if name.split(".")[0] in TORCH_NAMES
    ]


def sources_of(*parts: str) -> list[Source]:
    return [source for source in python_sources(PACKAGE) if part_of(source.module) in parts]


def test_every_part_has_a_layer() -> None:
    parts = {part_of(source.module) for source in python_sources(PACKAGE)} - {""}
    assert parts, "no sources found"
    assert parts <= set(LAYERS), f"give these a layer: {sorted(parts - set(LAYERS))}"


def test_every_package_can_be_found_by_setup() -> None:
    folders = {(ROOT / source.path).parent for source in python_sources(PACKAGE)}
    missing = [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing, f"without __init__.py these are not installed: {missing}"


def test_imports_point_down() -> None:
    wrong = [line for source in python_sources(PACKAGE) for line in wrong_imports(source)]
    assert not wrong, "\n".join(wrong)


def test_torch_free_parts_name_no_torch() -> None:
    wrong = [line for source in sources_of(*TORCH_FREE) for line in torch_imports(source)]
    assert not wrong, "\n".join(wrong)


def test_torch_free_parts_load_no_torch() -> None:
    modules = [source.module for source in sources_of(*TORCH_FREE)]
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = [other for other in {TORCH_NAMES!r} if other in sys.modules]\n"
        "    assert not loaded, f'{name} loads {loaded}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("path", "text", "wrong"),
    [
        ("growth/plan.py", "from megatron_sgt.config import Config", False),
        ("growth/plan.py", "from megatron_sgt.growth.gates import decay", False),
        ("growth/plan.py", "from . import gates", False),
        ("growth/plan.py", "from megatron_sgt.ops import norm", True),
        ("growth/plan.py", "from ..ops import norm", True),
        ("growth/plan.py", "import megatron_sgt.engine.loop", True),
        ("growth/plan.py", "def f():\n    from megatron_sgt import engine", True),
        ("growth/plan.py", "import importlib\nimportlib.import_module('megatron_sgt.engine')", True),
        ("growth/__init__.py", "from .plan import LoopPlan", False),
        ("growth/__init__.py", "from ..model import spec", True),
        ("engine/loop.py", "from megatron_sgt.checkpoint import save", False),
        ("engine/loop.py", "from megatron_sgt.guard.stop import StopRequests", False),
        ("guard/watch.py", "from megatron_sgt.engine.hooks.base import Hook", True),
        ("engine/loop.py", "from megatron_sgt.export import to_hf", True),
        ("errors.py", "from megatron_sgt.config import Config", True),
        ("errors.py", "from megatron_sgt import cli", True),
        ("cli.py", "from megatron_sgt.errors import SGTError", False),
        ("cli.py", "from megatron_sgt.config import Config", True),
        ("cli.py", "from megatron_sgt import __version__", False),
        ("__init__.py", "from megatron_sgt.errors import SGTError", True),
    ],
)
def test_the_rule_sees_what_it_should(path: str, text: str, wrong: bool) -> None:
    assert bool(wrong_imports(Source(f"{PACKAGE}/{path}", text))) is wrong
