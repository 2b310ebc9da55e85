"""A login node without torch must be able to validate, plan and submit."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["megatron_sgt.config", "megatron_sgt.launch", "megatron_sgt.growth"])
def test_import_does_not_load_torch(package: str) -> None:
    # Every module of the package, not just what its __init__ pulls in.
    code = (
        "import importlib, pkgutil, sys\n"
        f"package = importlib.import_module({package!r})\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        f"    importlib.import_module({package!r} + '.' + module.name)\n"
        "heavy = {'torch', 'megatron', 'deepspeed', 'mpi4py'}\n"
        "print(sorted(heavy.intersection(name.partition('.')[0] for name in sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
