"""The protocol of hooks, and the hooks that exist against it."""

import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torch

import megatron_sgt.engine
from megatron_sgt.engine.hooks.base import Hook, StatelessHook
from megatron_sgt.engine.state import TrainState
from megatron_sgt.engine.step import StepResult

METHODS = ("before_run", "after_step", "after_run", "on_stop", "state_dict", "load_state_dict")


def hook_classes() -> list[type[Any]]:
    """Every hook of the engine package, found by its base."""
    for module in pkgutil.iter_modules(megatron_sgt.engine.__path__, "megatron_sgt.engine."):
        importlib.import_module(module.name)
    ours = [hook for hook in StatelessHook.__subclasses__() if hook.__module__.startswith("megatron_sgt.")]
    return sorted(ours, key=lambda hook: hook.__name__)


def test_the_list_of_methods_is_the_protocols() -> None:
    assert {name for name, value in vars(Hook).items() if inspect.isfunction(value)} >= set(METHODS)
    assert {name for name in vars(Hook) if not name.startswith("_")} == set(METHODS)


def test_every_hook_follows_the_protocol() -> None:
    hooks = hook_classes()
    assert {"GrowthHook", "CheckpointHook", "EvalHook", "LogHook"} <= {hook.__name__ for hook in hooks}
    for hook in [StatelessHook, *hooks]:
        for name in METHODS:
            wanted = list(inspect.signature(getattr(Hook, name)).parameters)
            assert list(inspect.signature(getattr(hook, name)).parameters) == wanted, f"{hook}.{name}"


def test_names_are_keys_of_the_checkpoint_and_so_differ() -> None:
    names = [hook.name for hook in hook_classes() if not hook.__name__.startswith("_")]
    assert len(set(names)) == len(names)
    assert StatelessHook.name not in names


@pytest.mark.parametrize("method", ["before_run", "after_run"])
def test_a_stateless_hook_does_and_keeps_nothing(method: str) -> None:
    hook, state = StatelessHook(), TrainState(3, 6)
    getattr(hook, method)(state)
    hook.after_step(state, StepResult(torch.tensor(1.0), 1.0, True, 1e-3, 0.1))
    assert state == TrainState(3, 6)
    assert hook.state_dict() == {}
    hook.load_state_dict({"from": "another version"})
    assert hook.state_dict() == {}
