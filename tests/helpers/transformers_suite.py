"""transformers' own tests of models, from its source distribution.

They are in no wheel and not in this repository: ``make transformers-suite`` downloads them for the installed version.
The source distribution has ``tests/test_*.py`` alone, without the folders beside them; of what is missing, the tests
of models import two classes of more tests, for which empty ones stand here.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import transformers

PACKAGE = "transformers_own_tests"
MISSING = {"generation.test_utils": "GenerationTesterMixin", "exporters.test_export": "ExportTesterMixin"}


def suite_folder() -> Path:
    """Where the sources of the installed version's tests are, or should be."""
    root = Path(__file__).parents[2]
    chosen = os.environ.get("TRANSFORMERS_SUITE") or root / ".venv-transformers-suite"
    return Path(chosen) / transformers.__version__ / "tests"


def load_suite(name: str) -> Any:
    """The module ``name`` ("test_modeling_common") of transformers' tests.

    Raises:
        FileNotFoundError: they have not been downloaded.
    """
    folder = suite_folder()
    if not (folder / f"{name}.py").is_file():
        raise FileNotFoundError(f"{folder} has no {name}.py: run make transformers-suite")
    if PACKAGE not in sys.modules:
        _hide_unusable_datasets()
        sys.path.append(str(folder.parents[1]))  # what the tests themselves need
        for package in (PACKAGE, *(f"{PACKAGE}.{module.split('.')[0]}" for module in MISSING)):
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(folder)]
        for module, kind in MISSING.items():
            stand_in = types.ModuleType(f"{PACKAGE}.{module}")
            setattr(stand_in, kind, type(kind, (), {}))
            sys.modules[stand_in.__name__] = stand_in
    return importlib.import_module(f"{PACKAGE}.{name}")


def _hide_unusable_datasets() -> None:
    """The library ``datasets`` of this environment needs a newer huggingface_hub than transformers 4 has."""
    try:
        importlib.import_module("datasets")
    except ImportError:
        utils: Any = importlib.import_module("transformers.utils.import_utils")
        utils._datasets_available = False
