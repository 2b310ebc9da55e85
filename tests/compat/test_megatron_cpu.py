"""Megatron-Core without a GPU: the CPU's random streams, and what is replaced when."""

import warnings
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from megatron_sgt.compat import megatron_cpu
from megatron_sgt.compat.megatron_cpu import (
    SUPPORTED_MEGATRON,
    CpuRNGStatesTracker,
    check_megatron_version,
    prepare_megatron,
)
from tests.helpers.cuda_tracker import TRACKERS
from tests.helpers.cuda_tracker import tracker as named_tracker

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def tracker() -> CpuRNGStatesTracker:
    tracker = CpuRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    return tracker


def test_a_stream_does_not_depend_on_the_others(tracker: CpuRNGStatesTracker) -> None:
    alone = CpuRNGStatesTracker()
    alone.add("a", 1)
    with alone.fork("a"):
        wanted = torch.rand(6)
    with tracker.fork("a"):
        first = torch.rand(2)
        with tracker.fork("b"):
            torch.rand(5)
        second = torch.rand(1)
    torch.rand(7)
    with tracker.fork("a"):
        third = torch.rand(3)
    assert torch.equal(torch.cat([first, second, third]), wanted)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_stream_inside_itself_goes_on(name: str) -> None:
    """Under sequence parallelism attention forks the stream that all layers run in: no number may come twice."""
    with named_tracker(name):
        tracker = megatron_random.get_cuda_rng_tracker()
        tracker.reset()
        tracker.add("a", 1)
        with tracker.fork("a"):
            wanted = torch.rand(5)
        tracker.reset()
        tracker.add("a", 1)
        with tracker.fork("a"):
            found = [torch.rand(1)]
            with tracker.fork("a"):
                found.append(torch.rand(2))
            found.append(torch.rand(1))
        with tracker.fork("a"):
            found.append(torch.rand(1))
        assert torch.equal(torch.cat(found), wanted)


def test_the_generator_itself_is_left_alone(tracker: CpuRNGStatesTracker) -> None:
    state = torch.get_rng_state()
    tracker.add("c", 3)
    with tracker.fork("c"):
        torch.rand(5)
    with pytest.raises(ZeroDivisionError), tracker.fork("c"):
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state)


def test_names_are_used_once(tracker: CpuRNGStatesTracker) -> None:
    with pytest.raises(ValueError, match="random stream 'a' exists already"):
        tracker.add("a", 9)
    tracker.reset()
    tracker.add("a", 9)


def test_saved_states_are_not_moved_by_drawing(tracker: CpuRNGStatesTracker) -> None:
    saved = tracker.get_states()
    with tracker.fork("a"):
        wanted = torch.rand(3)
    for _ in range(2):
        tracker.set_states(dict(saved))
        with tracker.fork("a"):
            assert torch.equal(torch.rand(3), wanted)


def test_the_default_stream_is_megatrons_model_parallel_one(tracker: CpuRNGStatesTracker) -> None:
    tracker.add("model-parallel-rng", 4)
    with tracker.fork():
        default = torch.rand(3)
    tracker.reset()
    tracker.add("model-parallel-rng", 4)
    with tracker.fork("model-parallel-rng"):
        assert torch.equal(torch.rand(3), default)


def test_preparing_a_cpu_twice_keeps_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    prepare_megatron(CPU)
    tracker = megatron_random.get_cuda_rng_tracker()
    assert isinstance(tracker, CpuRNGStatesTracker)
    prepare_megatron(CPU)
    assert megatron_random.get_cuda_rng_tracker() is tracker
    assert torch.empty(2, device=torch.cuda.current_device()).device == CPU


def test_preparing_a_gpu_replaces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    untouched: Any = object()
    for owner, name in (
        (torch.cuda, "current_device"),
        (megatron_random, "_get_cuda_rng_state"),
        (megatron_random, "_set_cuda_rng_state"),
        (megatron_random, "_CUDA_RNG_STATE_TRACKER"),
    ):
        monkeypatch.setattr(owner, name, untouched)
    prepare_megatron(GPU)
    assert torch.cuda.current_device is untouched
    assert megatron_random._get_cuda_rng_state is untouched
    assert megatron_random._CUDA_RNG_STATE_TRACKER is untouched


def test_a_cpu_run_beside_a_gpu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="parallel.device is cpu although a GPU is present"):
        prepare_megatron(CPU)


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        ("0.16.1", False),
        ("0.16.0rc0", False),
        ("0.18.2+local", False),
        ("0.19.2", False),
        ("0.15.3", True),
        ("0.20.0rc0", True),
        ("0.20.0", True),
        ("1.0.0", True),
    ],
)
def test_versions(version: str, warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_cpu, "megatron_version", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_megatron_version()
    assert [str(w.message) for w in caught] == (
        [f"megatron-core {version} is installed; megatron_sgt is tested on {SUPPORTED_MEGATRON}"] if warned else []
    )


def test_activation_checkpointing_restores_both_streams() -> None:
    """Megatron's own checkpoint, as recompute "full" uses it, over the generator and a named stream."""
    prepare_megatron(CPU)
    tracker = megatron_random.get_cuda_rng_tracker()
    before = tracker.get_states()
    try:
        masks: list[torch.Tensor] = []

        def body(x: torch.Tensor) -> torch.Tensor:
            with tracker.fork("test"):
                named = torch.rand(4)
            masks.append(torch.cat([named, torch.rand(4)]))
            return (x * masks[-1]).sum()

        tracker.reset()
        tracker.add("test", 5)
        x = torch.ones(8, requires_grad=True)
        out = megatron_random.checkpoint(body, False, x)
        with tracker.fork("test"):
            torch.rand(3)
        state = torch.get_rng_state()
        out.backward()
        assert torch.equal(masks[0], masks[1])
        assert x.grad is not None and torch.equal(x.grad, masks[0])
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        tracker.set_states(before)
