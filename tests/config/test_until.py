"""Where the entries of a list end."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_sgt.config.until import Until


@pytest.mark.parametrize(
    ("given", "last"),
    [
        ({"until_steps": 7}, 7),
        ({"until_tokens": 1}, 1),
        ({"until_tokens": 300}, 3),
        ({"until_tokens": 301}, 4),
        ({"until_tokens": 10**15}, 10**13),
    ],
)
def test_an_entry_ends_with_a_whole_step(given: dict[str, int], last: int) -> None:
    assert Until(**given).last_step(tokens_per_step=100) == last


@pytest.mark.parametrize("given", [{}, {"until_steps": 1, "until_tokens": 1}, {"until_steps": 0}, {"until_tokens": -1}])
def test_it_has_one_end(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="until_"):
        Until(**given)
