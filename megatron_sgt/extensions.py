"""What installed packages add to this one, by name: schedules, hooks, optimizers and more.

A package registers an object under a group of entry points, in its ``setup.cfg`` or ``pyproject.toml``::

    [project.entry-points."megatron_sgt.hooks"]
    my_hook = "my_package.hooks:MyHook"

A configuration may then say the name. It can never name code: what is not registered by an installed package, or by
``register`` in the process that trains, is refused. What an object of a group must be is said where the group's
built-in ones stand (``GROUPS``); it is imported when a run asks for it, not before.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from megatron_sgt.errors import ConfigError

GROUPS = {
    "schedules": "megatron_sgt/growth/schedule.py",
    "hooks": "megatron_sgt/engine/hooks/base.py",
    "optimizers": "megatron_sgt/optim/optimizer.py",
    "lr_schedules": "megatron_sgt/optim/schedule.py",
    "datasets": "megatron_sgt/data/gpt_dataset.py",
    "ffn": "megatron_sgt/arch/ffn.py",
}
"""Name of each group (entry points: ``megatron_sgt.<name>``), and the module that says what its objects are."""

_registered: dict[tuple[str, str], Any] = {}


def register(group: str, name: str, extension: Any) -> None:
    """Add ``extension`` in this process, as an entry point would. Every rank of a run must do it.

    Raises:
        ValueError: an unknown group, or a name that the group has.
    """
    if name in names(group):
        raise ValueError(f"megatron_sgt.{group} has {name!r} already")
    _registered[group, name] = extension


def unregister(group: str, name: str) -> None:
    """Take back what ``register`` added."""
    del _registered[group, name]


def names(group: str) -> list[str]:
    """What is registered in ``group``, in alphabetical order. Imports none of it.

    Raises:
        ValueError: the group is unknown.
    """
    installed = {point.name for point in _entry_points(group)}
    return sorted(installed | {name for of, name in _registered if of == group})


def load(group: str, name: str) -> Any:
    """The object registered as ``name``.

    Raises:
        ConfigError: nothing has this name, two packages claim it, or it cannot be imported.
        ValueError: an unknown group.
    """
    if (group, name) in _registered:
        return _registered[group, name]
    found = [point for point in _entry_points(group) if point.name == name]
    if len(found) != 1:
        claims = " and ".join(sorted(point.value for point in found))
        known = ", ".join(names(group)) or "nothing"
        problem = f"claimed by {claims}" if found else f"not registered; installed packages add {known}"
        raise ConfigError(f"{name!r} of megatron_sgt.{group} is {problem}")
    try:
        return found[0].load()
    except Exception as error:
        raise ConfigError(
            f"{name!r} of megatron_sgt.{group} ({found[0].value}) cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _entry_points(group: str) -> list[EntryPoint]:
    if group not in GROUPS:
        raise ValueError(f"group {group!r}: choose one of {', '.join(GROUPS)}")
    # A package that is found twice on the path (an editable install in its own folder) is one claim.
    return list({(p.name, p.value): p for p in entry_points(group=f"megatron_sgt.{group}")}.values())
