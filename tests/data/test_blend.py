from collections import Counter

import pytest

from megatron_sgt.data.blend import PERIOD, Blend, round_to_period


def test_weights_become_integers_of_the_period() -> None:
    assert round_to_period([5.0]) == (1,)
    assert round_to_period([1, 1]) == (PERIOD // 2, PERIOD // 2)
    for weights in ([0.3, 0.7], [1, 2, 4, 8], [1 / 3, 1 / 3, 1 / 3], [1e-5, 1]):
        counts = round_to_period(weights)
        assert sum(counts) == PERIOD
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - weight / sum(weights) * PERIOD) < 1


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1e-9, 1.0]])
def test_refuses_weights_that_cannot_count(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        Blend(weights)


@pytest.mark.parametrize("weights", [[0.3, 0.7], [1, 1, 1], [0.05, 0.25, 0.7], [100, 1]])
def test_every_prefix_is_close_to_the_weights(weights: list[float]) -> None:
    blend = Blend(weights)
    seen: Counter[int] = Counter()
    for index in range(3000):
        source, rank = blend[index]
        assert rank == seen[source], "the samples of a data set come one after the other"
        seen[source] += 1
        for d, weight in enumerate(weights):
            assert abs(seen[d] - (index + 1) * weight / sum(weights)) <= 1.0


def test_ranks_go_on_over_the_period() -> None:
    blend = Blend([1, 2])
    counts = round_to_period([1, 2])
    first = next(i for i in range(10) if blend[i][0] == 0)
    assert blend[PERIOD + first] == (0, counts[0])
    assert blend[10**6 * PERIOD + first] == (0, 10**6 * counts[0])


def test_one_data_set_needs_no_blend() -> None:
    assert [Blend([3.0])[i] for i in (0, 1, 12345)] == [(0, 0), (0, 1), (0, 12345)]


@pytest.mark.parametrize("samples", [0, 1, 7, 1000, PERIOD - 1, PERIOD, 2 * PERIOD + 5])
def test_how_many_are_drawn_is_what_is_drawn(samples: int) -> None:
    blend = Blend([0.5, 0.2, 0.3])
    last = dict.fromkeys(range(3), -1) | dict(blend[i] for i in range(max(0, samples - 100), samples))
    assert sum(blend.drawn(samples)) == samples
    assert all(last[d] in (-1, count - 1) for d, count in enumerate(blend.drawn(samples)))
