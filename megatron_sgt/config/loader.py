"""Reads YAML files and overrides into a Config, or raises one ConfigError that names every problem."""

import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_sgt.config.base import EXPAND, shown
from megatron_sgt.config.presets import Preset
from megatron_sgt.config.problems import explain
from megatron_sgt.config.root import Config
from megatron_sgt.config.yaml_io import parse_value, read_mapping
from megatron_sgt.errors import ConfigError
from megatron_sgt.paths import as_recorded, expand


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    preset: Preset | None = None,
    fill_in: Callable[[str], str] = expand,
) -> Config:
    """Read a configuration.

    path: YAML file. Its key ``base:`` names another one (relative to it) whose values it overrides key by key.
    overrides: ``section.key=value`` each, the value as ``parse_value`` reads it. preset: its values override the file's
    and are overridden by the overrides; those of the model alone lie over both, as it makes them of both. fill_in: what
    is made of every path (paths.py).

    Raises:
        ConfigError: file missing or not YAML, a cycle of ``base:``, unknown keys, bad values; all at once.
    """
    path = Path(path)
    values = _read_with_bases(path, (), fill_in)
    chosen: dict[str, Any] = {}
    if preset is not None:
        chosen = preset(with_overrides(values, overrides))  # it depends on sizes that may be overridden
        values = _merge(values, chosen)
    values = with_overrides(values, overrides)
    if "model" in chosen:
        values = _merge(values, {"model": chosen["model"]})
    return parse_config(values, str(path), fill_in)


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return plain ``values`` with each ``section.key=value`` over them.

    Raises:
        ConfigError: an override that is none.
    """
    made = copy.deepcopy(dict(values))
    for override in overrides:
        _apply_override(made, override)
    return made


def recorded_config(path: Path) -> Config:
    """The configuration that a run has recorded, in a checkpoint or beside its metrics: its paths as they were there.

    Raises:
        ConfigError: as ``load_config``.
    """
    return load_config(path, fill_in=as_recorded)


def repeated(overrides: Sequence[str]) -> list[str]:
    """One line for every override that a later one takes back, wholly or with the section that it is in."""
    lines = []
    names = [override.partition("=")[0].strip() for override in overrides]
    for index, name in enumerate(names):
        later = [other for other in range(index + 1, len(names)) if f"{name}.".startswith(f"{names[other]}.")]
        if later:
            lines.append(f"{overrides[index]} has no effect: {overrides[later[-1]]} follows")
    return lines


def parse_config(
    values: Mapping[str, Any], source: str = "configuration", fill_in: Callable[[str], str] = expand
) -> Config:
    """Validate plain values, as read from YAML. fill_in: what is made of every path.

    Raises:
        ConfigError: with one line per problem.
    """
    # A section with every line commented out is empty, not null.
    sections = {key: {} if value is None and key in Config.model_fields else value for key, value in values.items()}
    try:
        return Config.model_validate(sections, context={EXPAND: fill_in})
    except ValidationError as error:
        lines = explain(error, Config)
    if len(lines) == 1:
        raise ConfigError(f"{source}: {lines[0]}")
    raise ConfigError("\n  ".join([f"{source}: {len(lines)} problems", *lines]))


def _read_with_bases(path: Path, chain: tuple[Path, ...], fill_in: Callable[[str], str]) -> dict[str, Any]:
    """Return the values of a file over those of its base. ``chain``: the files that led here."""
    real = path.resolve()
    if real in chain:
        names = " -> ".join(str(step) for step in (*chain[chain.index(real) :], real))
        raise ConfigError(f"{path}: base: goes round in a circle: {names}")
    if not path.exists():
        raise ConfigError(_missing_file(path, chain))
    values = read_mapping(path)
    if "base" not in values:
        return values
    base = values.pop("base")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: must be the path of another YAML file, got {base!r}")
    try:
        below = path.parent / fill_in(base)
    except ValueError as error:
        raise ConfigError(f"{path}: base: {error}") from None
    return _merge(_read_with_bases(below, (*chain, real), fill_in), values)


def _missing_file(path: Path, chain: tuple[Path, ...]) -> str:
    neighbours = [other.name for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, neighbours, n=1)
    hint = f"; did you mean '{path.parent / close[0]}'?" if close else ""
    origin = f" (base: of {chain[-1]})" if chain else ""
    return f"no such file: {path}{origin}{hint}"


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``above`` over ``below``: two mappings are merged key by key, anything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and (isinstance(value, dict) or (value is None and key in Config.model_fields)):
            value = _merge(old, value or {})
        merged[key] = value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"override {shown(override)}: must be section.key=value in one word, e.g. train.train_iters=100"
        )
    if name.startswith("--"):
        raise ConfigError(f"override {shown(override)}: settings are given without dashes: {name.lstrip('-')}=...")
    value = parse_value(text, f"override {shown(override)}")
    target = values
    for depth, key in enumerate(keys[:-1], start=1):
        inner = target.get(key)
        if inner is None:
            inner = target[key] = {}
        elif not isinstance(inner, dict):
            raise ConfigError(f"override {shown(override)}: {'.'.join(keys[:depth])} is {inner!r}, not a section")
        target = inner
    target[keys[-1]] = value
