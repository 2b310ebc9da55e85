from itertools import pairwise

import pytest

from megatron_sgt.growth.gates import decay, window_gate


@pytest.mark.parametrize(
    ("decay_type", "r", "gate"),
    [
        ("linear", 0.0, 1.0),
        ("linear", 0.25, 0.75),
        ("cosine", 0.0, 1.0),
        ("cosine", 1 / 3, 0.75),
        ("cosine", 0.5, 0.5),
        ("cosine", 2 / 3, 0.25),
        ("exponential", 0.0, 1.0),
        ("exponential", 0.125, 0.1),
        ("exponential", 0.5, 1e-4),
    ],
)
def test_curve(decay_type: str, r: float, gate: float) -> None:
    assert decay(decay_type, r) == pytest.approx(gate, rel=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("decay_type", ["linear", "cosine", "exponential"])
def test_gate_falls_from_one_to_exactly_zero(decay_type: str) -> None:
    gates = [window_gate(decay_type, step, 10, 7) for step in range(10, 20)]  # type: ignore[arg-type]
    assert gates[0] == 1.0
    assert all(a > b for a, b in pairwise(gates[:8]))
    assert gates[6] > 0.0
    assert gates[7:] == [0.0, 0.0, 0.0]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="linear, cosine, exponential"):
        decay("quadratic", 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="before its window opened"):
        window_gate("linear", 9, 10, 5)
