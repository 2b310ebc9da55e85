"""The metadata, the pinned versions and the commands of the Makefile agree with one another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_sgt.compat.megatron_cpu import SUPPORTED_MEGATRON
from tests.architecture.source_tree import PACKAGE, ROOT, python_sources

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# Not in the tested environment: it needs a network account.
UNPINNED = {"wandb"}


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    """The arguments that setup.py gives to setuptools.setup."""
    seen: dict[str, Any] = {}
    patch = pytest.MonkeyPatch()
    patch.setattr(setuptools, "setup", lambda **arguments: seen.update(arguments))
    patch.chdir(ROOT)
    path = ROOT / "setup.py"
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), {"__file__": str(path)})
    finally:
        patch.undo()
    return seen


def pins(python: str) -> dict[str, Version]:
    """Package -> version for one Python. Fails on a line that is no exact version, or on a double."""
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"python_version": python}):
            continue
        (specifier,) = requirement.specifier
        name = canonicalize_name(requirement.name)
        assert specifier.operator == "==" and name not in found, line
        found[name] = Version(specifier.version)
    return found


def requirements(metadata: dict[str, Any]) -> list[Requirement]:
    extras = [line for lines in metadata["extras_require"].values() for line in lines]
    return [Requirement(line) for line in [*metadata["install_requires"], *extras]]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_range(metadata: dict[str, Any], python: str) -> None:
    pinned = pins(python)
    for requirement in requirements(metadata):
        if requirement.name in UNPINNED:
            continue
        assert requirement.name in pinned, f"{requirement} has no line in constraints.txt for Python {python}"
        assert pinned[requirement.name] in requirement.specifier


def test_the_metadata_ask_for_the_megatron_that_is_supported(metadata: dict[str, Any]) -> None:
    (required,) = [r for r in requirements(metadata) if r.name == "megatron-core"]
    assert required.specifier == SpecifierSet(SUPPORTED_MEGATRON)


def test_both_ends_of_the_supported_megatron_are_pinned() -> None:
    series = {python: pins(python)["megatron-core"].release[:2] for python in PYTHONS}
    assert series["3.10"] == series["3.11"] == (0, 16)
    assert series["3.12"] == series["3.13"] == (0, 19)
    assert not SpecifierSet(SUPPORTED_MEGATRON).contains("0.15.99")
    assert not SpecifierSet(SUPPORTED_MEGATRON).contains("0.20.0")


def test_classifiers_name_the_pythons_with_pins(metadata: dict[str, Any]) -> None:
    named = {line.rpartition(" :: ")[2] for line in metadata["classifiers"] if " 3." in line}
    assert named == set(PYTHONS)


def test_pins_name_no_local_build() -> None:
    assert not [name for name, version in pins("3.11").items() if version.local]


def test_apex_and_transformer_engine_are_never_required(metadata: dict[str, Any]) -> None:
    names = {canonicalize_name(requirement.name) for requirement in requirements(metadata)}
    assert not names & {"apex", "transformer-engine", "flash-attn"}


def test_setup_finds_every_module_and_the_version(metadata: dict[str, Any]) -> None:
    packages = {source.package for source in python_sources(PACKAGE)}
    assert packages == set(metadata["packages"])
    text = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{metadata["version"]}"' in text
    assert metadata["python_requires"] == ">=3.10"


def test_every_import_is_declared(metadata: dict[str, Any]) -> None:
    declared = {canonicalize_name(requirement.name) for requirement in requirements(metadata)}
    modules = {"yaml": "pyyaml", "megatron": "megatron-core", "pydantic_core": "pydantic"}
    # Apex and Transformer Engine are used when importable; packaging comes with megatron-core.
    allowed = {"apex", "transformer-engine", "packaging", PACKAGE.replace("_", "-")}
    undeclared = set()
    for source in python_sources(PACKAGE):
        for line, name in source.imports():
            top = name.split(".")[0]
            if top in sys.stdlib_module_names:
                continue
            if canonicalize_name(modules.get(top, top)) not in declared | allowed:
                undeclared.add(f"{source.path}:{line} imports {top}")
    assert not undeclared, "\n".join(sorted(undeclared))


def test_help_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    named = set(re.findall(r"make ([\w-]+)", text))
    assert set(phony.split()) - {"help"} <= named


@pytest.mark.parametrize(
    ("target", "needed", "code"), [("test", "", 0), ("test", "1", 2), ("transformers-suite", "", 2)]
)
def test_what_cannot_be_downloaded_ends_no_tests(target: str, needed: str, code: int, tmp_path: Path) -> None:
    """transformers' own tests: nothing half-made is left, and those that are there stay until newer ones are whole."""
    (tmp_path / "stamp").touch()
    (tmp_path / "suite/1.0").mkdir(parents=True)
    said = {"STAMP": "stamp", "LOG": "log", "SUITE": "suite"}
    words = [f"{name}={tmp_path / value}" for name, value in said.items()]
    words += [f"PIP_BARE=mkdir {tmp_path}/suite.part; echo no network; false", "PYTEST=echo tests ran"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", target, *words],
        cwd=ROOT,
        env=environment | {"REQUIRE_LAUNCHERS": needed},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "no network" in done.stdout and "the tests that need them are skipped" in done.stdout
    assert ("tests ran" in done.stdout) == (code == 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "stamp", "suite"]
    assert [path.name for path in (tmp_path / "suite").iterdir()] == ["1.0"]
