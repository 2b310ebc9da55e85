"""What a fault is given, and what it says of the ranks afterwards."""

import random
from enum import Enum
from typing import NamedTuple


class Left(Enum):
    """What a fault leaves of the ranks."""

    ALIVE = "they go on"
    DYING = "they end, or are to be ended"
    GONE = "they have ended by themselves before it came"


class Aim(NamedTuple):
    """Where a fault strikes. ``fraction``: 0 to 1, for when; ``rng``: for all else that it draws."""

    rank: int
    fraction: float
    rng: random.Random
