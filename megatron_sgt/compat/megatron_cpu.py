"""Lets Megatron-Core's tensor-parallel modules run without a GPU.

Megatron-Core asks ``torch.cuda`` for the current device when it allocates gathered or scattered
tensors and keeps its random-number streams in CUDA generators. On a machine without a GPU those calls
fail before any arithmetic. The adaptation is small, guarded (it never acts where CUDA is used) and idempotent:

* ``torch.cuda.current_device()`` names the CPU, which every ``device=`` argument accepts;
* the random-number tracker of ``megatron.core.tensor_parallel.random`` forks the CPU generator.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from megatron.core import __version__ as megatron_version
from megatron.core.tensor_parallel import random as megatron_random
from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED_MEGATRON = ">=0.16,<0.20"
"""The series whose seams this project was tested on (docs/design.md); setup.py requires the same."""


def check_megatron_version() -> None:
    """Warn when Megatron-Core is not of a series whose seams this project was tested on."""
    series = Version(megatron_version).base_version  # a release candidate is of its series
    if series not in SpecifierSet(SUPPORTED_MEGATRON):
        warnings.warn(
            f"megatron-core {megatron_version} is installed; megatron_sgt is tested on {SUPPORTED_MEGATRON}",
            stacklevel=2,
        )


class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron's named random streams, kept in the CPU generator. Same interface as the CUDA tracker."""

    _current_state_name: str

    def add(self, name: str, seed: int) -> None:
        """Start the stream ``name`` from ``seed``; the generator's own state is left as it was."""
        if name in self.states_:
            raise ValueError(f"random stream {name!r} exists already")
        self._is_initialized = True
        self.seeds_.add(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.states_[name] = torch.get_rng_state()

    @contextlib.contextmanager
    def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Run the body on the stream ``name``, then restore the generator.

        As in Megatron: a nested fork, of the same stream or another, first saves the running stream, so that each
        number of a stream is drawn once.
        """
        outer, outer_name = torch.get_rng_state(), self._current_state_name
        if outer_name in self.states_:
            self.states_[outer_name] = outer
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(self.states_.get(outer_name, outer))
            self._current_state_name = outer_name


def _get_cpu_state(*args: object, **kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
    torch.set_rng_state(state)


def prepare_megatron(device: torch.device) -> None:
    """Check the version and, for a CPU device, install the adaptation described above."""
    check_megatron_version()
    if device.type != "cpu":
        return
    if torch.cuda.is_available():
        # Training on the CPU of a GPU machine: Megatron-Core uses current_device() only for allocation, so naming the
        # CPU is right here too.
        warnings.warn("parallel.device is cpu although a GPU is present", stacklevel=2)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    # Activation checkpointing stores and restores the generator through these two names.
    megatron_random._get_cuda_rng_state = _get_cpu_state
    megatron_random._set_cuda_rng_state = _set_cpu_state
    if not isinstance(megatron_random._CUDA_RNG_STATE_TRACKER, CpuRNGStatesTracker):
        megatron_random._CUDA_RNG_STATE_TRACKER = CpuRNGStatesTracker()
        megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
