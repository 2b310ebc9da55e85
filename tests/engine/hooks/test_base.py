"""The base of all hooks, the hooks that exist against it, and which of a user's are refused."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import megatron_sgt.engine.hooks
from megatron_sgt import extensions
from megatron_sgt.engine.hooks.base import BUILT_IN, Hook, own_hooks
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.errors import ConfigError
from tests.helpers.single import small_config

METHODS = (
    "attach",
    "before_run",
    "after_step",
    "after_stage",
    "after_run",
    "on_stop",
    "on_save_now",
    "state_dict",
    "load_state_dict",
)


def below(base: type[Any]) -> Iterator[type[Any]]:
    for hook in base.__subclasses__():
        yield hook
        yield from below(hook)


def hook_classes() -> list[type[Any]]:
    """Every hook of the engine package, found by its base."""
    for module in pkgutil.iter_modules(megatron_sgt.engine.hooks.__path__, "megatron_sgt.engine.hooks."):
        importlib.import_module(module.name)
    ours = [hook for hook in below(Hook) if hook.__module__.startswith("megatron_sgt.")]
    return sorted(ours, key=lambda hook: hook.__name__)


def test_the_list_of_methods_is_the_base_s() -> None:
    assert {name for name, value in vars(Hook).items() if inspect.isfunction(value)} == set(METHODS)


def test_every_hook_follows_the_base() -> None:
    hooks = hook_classes()
    assert {"GrowthHook", "CheckpointHook", "EvalHook", "LogHook"} <= {hook.__name__ for hook in hooks}
    for hook in hooks:
        for name in METHODS:
            wanted = list(inspect.signature(getattr(Hook, name)).parameters)
            assert list(inspect.signature(getattr(hook, name)).parameters) == wanted, f"{hook}.{name}"


def test_names_are_keys_of_the_checkpoint_and_so_differ() -> None:
    acting = [hook for hook in hook_classes() if not hook.__subclasses__()]  # not what others have in common
    names = [hook.name for hook in acting if not hook.__name__.startswith("_")]
    assert sorted(names) == sorted(BUILT_IN)


@pytest.mark.parametrize("method", ["before_run", "after_stage", "after_run"])
def test_the_base_does_and_keeps_nothing(method: str) -> None:
    hook, state = Hook(), TrainState(3, 6)
    getattr(hook, method)(state)
    hook.after_step(state, StepResult(torch.tensor(1.0), 1.0, True, 1e-3, 0.1))
    assert state == TrainState(3, 6)
    assert hook.state_dict() == {}
    hook.load_state_dict({"from": "another version"})
    assert hook.state_dict() == {}


class Named(Hook):
    def __init__(self, name: str = "mine") -> None:
        self.name = name


@pytest.fixture
def mine() -> Iterator[None]:
    extensions.register("hooks", "mine", Named)
    yield
    extensions.unregister("hooks", "mine")


def test_a_user_s_hooks_come_in_order(mine: None) -> None:
    config = small_config(train={"hooks": ["mine"]})
    assert [hook.name for hook in own_hooks(config, [Named("b"), Named("a")])] == ["b", "a", "mine"]
    assert own_hooks(small_config()) == []


@pytest.mark.parametrize("name", ["growth", "eval", "checkpoint", "train", "data", "hook", "mine"])
def test_a_name_that_is_taken_is_refused(mine: None, name: str) -> None:
    """By a built-in hook, even one that this run does not have; by a phase of the loop; by the base; by another."""
    with pytest.raises(ConfigError, match=f"hook Named: its name '{name}' is taken"):
        own_hooks(small_config(train={"hooks": ["mine"]}), [Named(name)])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "'theirs' of megatron_sgt.hooks is not registered"),
        (dict, "train.hooks: 'theirs' makes a dict, not a Hook"),
        (lambda config: Hook(), "train.hooks: 'theirs' cannot be made without arguments: .*'config'"),
    ],
)
def test_what_is_no_hook_is_refused(made: Any, message: str) -> None:
    if made is not None:
        extensions.register("hooks", "theirs", made)
    try:
        with pytest.raises(ConfigError, match=message):
            own_hooks(small_config(train={"hooks": ["theirs"]}))
    finally:
        if made is not None:
            extensions.unregister("hooks", "theirs")


def test_a_bug_in_a_hook_s_own_code_is_not_taken_for_a_wrong_setting() -> None:
    class Buggy(Hook):
        def __init__(self) -> None:
            len(3)  # type: ignore[arg-type]

    extensions.register("hooks", "theirs", Buggy)
    try:
        with pytest.raises(TypeError, match="len"):
            own_hooks(small_config(train={"hooks": ["theirs"]}))
    finally:
        extensions.unregister("hooks", "theirs")
