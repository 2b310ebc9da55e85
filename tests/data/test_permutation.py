from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from megatron_sgt.data import permutation
from megatron_sgt.data.permutation import RandomPermutation


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1009, 4096])
def test_every_element_once(n: int) -> None:
    perm = RandomPermutation(n, (1, 2))
    assert sorted(perm[i] for i in range(n)) == list(range(n))


def test_order_depends_on_the_key_and_only_on_it() -> None:
    order = [RandomPermutation(1000, (7, 0, 3))[i] for i in range(1000)]
    assert order == [RandomPermutation(1000, (7, 0, 3))[i] for i in range(1000)]
    assert order != [RandomPermutation(1000, (7, 0, 4))[i] for i in range(1000)]
    assert order != list(range(1000))


def test_order_of_a_published_run_stays_the_same() -> None:
    """A change of these numbers would reorder the data of every run that is resumed."""
    perm = RandomPermutation(10**12, (1234, 0, 0))
    assert [perm[i] for i in (0, 1, 10**11)] == PINNED


PINNED = [363245540654, 139986986290, 254451878720]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1009, 10**12])
def test_the_inverse_undoes_it(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutation, "_AT_ONCE", 100)
    perm, positions = RandomPermutation(n, (1, 2)), range(0, n, max(1, n // 1000))
    assert perm.places(np.array([perm[i] for i in positions])).tolist() == list(positions)


def test_places_are_uniform() -> None:
    """Where element 0 of 10 goes, over many keys: a chi-square test with 9 degrees of freedom, p = 1e-4."""
    keys = 5000
    places = Counter(RandomPermutation(10, (key,))[0] for key in range(keys))
    chi_square = sum((places[place] - keys / 10) ** 2 / (keys / 10) for place in range(10))
    assert chi_square < 33.7


def test_neighbours_are_scattered() -> None:
    """The mean distance of two uniform numbers below n is n/3."""
    n = 100_000
    perm = RandomPermutation(n, (0,))
    places = [perm[i] for i in range(2001)]
    mean = sum(abs(a - b) for a, b in pairwise(places)) / 2000
    assert abs(mean - n / 3) < 0.03 * n


def test_rejects_what_is_out_of_range() -> None:
    with pytest.raises(ValueError, match="at least one"):
        RandomPermutation(0, ())
    with pytest.raises(IndexError, match="outside"):
        RandomPermutation(3, ())[3]
