"""Random permutations of 0..n-1 that need no table: any element in constant time and memory.

An epoch of a large data set has billions of samples; a table of its order would cost gigabytes per process
and minutes at every start. Here the order is a keyed bijection defined in this file alone, so that
a library update cannot change the order of a resumed run.
"""

import hashlib
from math import isqrt

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 8
_AT_ONCE = 1 << 20


class RandomPermutation:
    """A permutation of ``range(n)`` chosen by ``key``: ``perm[i]`` is where position i goes.

    Generalised Feistel network with cycle walking (J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains",
    CT-RSA 2002): i is written as (x, y) on the smallest grid of about √n × √n cells that holds n, then x and y are
    shifted in turn by a pseudo-random function of the other one. Every shift can be undone, so the whole is a
    bijection of the grid; a result outside ``range(n)`` is fed in again until it falls inside.
    """

    def __init__(self, n: int, key: tuple[int, ...]) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least one element, got {n}")
        self.n = n
        self._width = isqrt(n - 1) + 1
        self._height = -(-n // self._width)
        digest = hashlib.shake_256(repr(tuple(key)).encode()).digest(8 * _ROUNDS)
        self._round_keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(f"index {index} is outside 0..{self.n - 1}")
        index = self._shuffle_grid(index)
        while index >= self.n:
            index = self._shuffle_grid(index)
        return index

    def places(self, elements: np.ndarray) -> np.ndarray:
        """The inverse: at which positions ``elements`` stand, as int64 of their shape [m]."""
        found = np.empty(len(elements), np.int64)
        for start in range(0, len(elements), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            values = self._unshuffle_grid(elements[part].astype(np.uint64))
            while len(outside := np.flatnonzero(values >= self.n)):
                values[outside] = self._unshuffle_grid(values[outside])
            found[part] = values
        return found

    def _unshuffle_grid(self, values: np.ndarray) -> np.ndarray:
        width, height = np.uint64(self._width), np.uint64(self._height)
        y, x = np.divmod(values, width)
        for step, key in reversed(list(enumerate(self._round_keys))):
            if step % 2 == 0:
                x = (x + width - _mix_all(y ^ np.uint64(key)) % width) % width
            else:
                y = (y + height - _mix_all(x ^ np.uint64(key)) % height) % height
        return y * width + x

    def _shuffle_grid(self, index: int) -> int:
        y, x = divmod(index, self._width)
        for step, key in enumerate(self._round_keys):
            if step % 2 == 0:
                x = (x + _mix(y ^ key)) % self._width
            else:
                y = (y + _mix(x ^ key)) % self._height
        return y * self._width + x


def _mix(value: int) -> int:
    """64 bits to 64 well-mixed bits (the finalizer of SplitMix64, Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_all(values: np.ndarray) -> np.ndarray:
    """``_mix`` of every element of an array of uint64, which wraps around as the mask makes Python's integers do."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
