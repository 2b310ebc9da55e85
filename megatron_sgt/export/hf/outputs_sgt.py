"""Which outputs a caller wants."""

from __future__ import annotations

from torch import Tensor

from .configuration_sgt import SGTConfig


def chosen_states(states: list[Tensor], wanted: bool | int | list[int]) -> tuple[Tensor | None, ...]:
    """All of them; or those of which the numbers are given, and None in the places of the others."""
    if isinstance(wanted, bool):
        return tuple(states)
    numbers = {
        n % len(states) for n in ([wanted] if isinstance(wanted, int) else wanted) if -len(states) <= n < len(states)
    }
    return tuple(state if n in numbers else None for n, state in enumerate(states))


def wants_dict(return_dict: bool | None, config: SGTConfig) -> bool:
    """Whether to return an output of transformers; else a tuple."""
    return config.return_dict if return_dict is None else return_dict
