import numpy as np
import pytest

from megatron_sgt.growth.select import choose_heads, layer_scores, next_layer, top_k_layers

KEY = (0, 1, 250)


def test_layer_score_is_the_mean_over_heads() -> None:
    assert layer_scores(np.array([[0.0, 1.0], [0.25, 0.25]])).tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("scores", "k", "exclude", "expected"),
    [
        ([0.1, 0.4, 0.3, 0.2], 2, (), [1, 2]),
        ([0.9, 0.4, 0.3, 0.2], 2, (0,), [1, 2]),
        ([0.9, 0.4, 0.3], 5, (0,), [1, 2]),
        ([0.5, 0.5, 0.5, 0.5], 2, (0,), [1, 2]),
        ([0.1, 0.5, 0.2, 0.5], 3, (), [1, 3, 2]),
        ([0.5, 0.5], 1, (0, 1), []),
    ],
)
def test_top_k(scores: list[float], k: int, exclude: tuple[int, ...], expected: list[int]) -> None:
    assert top_k_layers(np.array(scores), k, exclude) == expected


@pytest.mark.parametrize(
    ("top", "selected", "deep_to_shallow", "shallow_to_deep"),
    [
        ([4, 1, 3], [], 4, 1),
        ([4, 1, 3], [3], 1, 4),
        ([5, 1, 2], [4, 3], 2, 5),
        ([4, 5], [3], None, 4),
        ([1, 2], [3], 2, None),
        ([3], [3], None, None),
        ([], [], None, None),
    ],
)
def test_next_layer(
    top: list[int], selected: list[int], deep_to_shallow: int | None, shallow_to_deep: int | None
) -> None:
    assert next_layer(top, selected, "deep_to_shallow") == deep_to_shallow
    assert next_layer(top, selected, "shallow_to_deep") == shallow_to_deep


@pytest.mark.parametrize(
    ("rule", "n", "expected"),
    [
        ("highest", 2, (1, 3)),
        ("highest", 3, (1, 2, 3)),
        ("lowest", 2, (0, 2)),
        ("all", 2, (0, 1, 2, 3)),
        ("all", 9, (0, 1, 2, 3)),
    ],
)
def test_head_rules_and_order(rule: str, n: int, expected: tuple[int, ...]) -> None:
    row = np.array([0.1, 0.9, 0.5, 0.6])
    assert choose_heads(row, n, rule, KEY) == expected  # type: ignore[arg-type]


def test_equal_heads_go_to_the_lower_index() -> None:
    row = np.array([0.5, 0.7, 0.5, 0.7, 0.5])
    assert choose_heads(row, 1, "highest", KEY) == (1,)
    assert choose_heads(row, 3, "highest", KEY) == (0, 1, 3)
    assert choose_heads(row, 2, "lowest", KEY) == (0, 2)


def test_random_heads_depend_on_the_key_alone() -> None:
    one, other = np.linspace(0, 1, 8), np.linspace(1, 0, 8)
    for seed in range(5):
        assert choose_heads(one, 3, "random", (seed, 2, 9)) == choose_heads(other, 3, "random", (seed, 2, 9))
    varied = [[(s, 2, 9) for s in range(20)], [(0, n, 9) for n in range(20)], [(0, 2, t) for t in range(20)]]
    for keys in varied:
        assert len({choose_heads(one, 3, "random", key) for key in keys}) > 10


def test_random_heads_are_evenly_drawn() -> None:
    row = np.zeros(8)
    drawn = [head for seed in range(800) for head in choose_heads(row, 2, "random", (seed, 0, 1))]
    counts = np.bincount(drawn, minlength=8)
    assert counts.sum() == 1600
    assert counts.min() > 150 and counts.max() < 250


def test_random_draw_is_stable_over_versions() -> None:
    drawn = [choose_heads(np.zeros(16), 3, "random", (1234, 5, step)) for step in (1, 2, 3)]
    assert drawn == [(0, 6, 13), (1, 8, 11), (10, 11, 13)]


@pytest.mark.parametrize("n", [0, 5])
def test_impossible_head_counts_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"num_keep_heads {n} does not fit 4 heads"):
        choose_heads(np.zeros(4), n, "highest", KEY)


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="'best'"):
        choose_heads(np.zeros(4), 2, "best", KEY)  # type: ignore[arg-type]
