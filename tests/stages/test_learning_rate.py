"""Where a stage's steps lie on the learning-rate curve."""

from __future__ import annotations

import pytest

from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.learning_rate import RatePolicy

LONG = f"rewarm({5000 * '9'})"


@pytest.mark.parametrize("text", ["continue", "rewarm(7)", "rewind(12)"])
def test_policies_are_read_back(text: str) -> None:
    assert str(RatePolicy.parse(text)) == text


@pytest.mark.parametrize("text", ["", "rewarm", "rewarm(0)", "rewind(-1)", "continue(3)", "restart", LONG])
def test_other_policies_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be continue, rewarm"):
        RatePolicy.parse(text)


def test_places_on_the_curve() -> None:
    assert RatePolicy.parse("continue").place(60, 50, 100) == (60, 1.0)
    rewarm = RatePolicy.parse("rewarm(10)")
    assert [rewarm.place(step, 50, 100) for step in (51, 55, 60, 61)] == [(51, 0.1), (55, 0.5), (60, 1.0), (61, 1.0)]
    rewind = RatePolicy.parse("rewind(20)")
    assert [rewind.place(step, 50, 100)[0] for step in (51, 75, 100, 120)] == [21.6, 60, 100, 120]
