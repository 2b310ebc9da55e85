"""Matrices of cases of which `make test` runs a share and `make test-all` the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def share_of(every: Iterable[Any], share: Iterable[Any]) -> list[Any]:
    """``every`` case once, for ``pytest.mark.parametrize``: those of ``share`` plain, the others marked exhaustive."""
    cases, kept = list(every), list(share)
    if missing := [case for case in kept if case not in cases]:
        raise ValueError(f"cases of the share that are not in the matrix: {missing}")
    return [case if case in kept else exhaustive(case) for case in cases]


def exhaustive(case: Any) -> Any:
    """One case that `make test-all` alone runs; a tuple holds the values of several parameters."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.exhaustive)
