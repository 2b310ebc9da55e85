import random
from collections import Counter
from itertools import islice

from soak_parts.faults import FAULTS, drawn
from soak_parts.moments import MOMENTS


def test_half_of_the_faults_strikes_inside_a_save() -> None:
    inside = sum(f.weight for kind, f in FAULTS.items() if "in a save" in kind or "inside a save" in kind)
    inside += sum(FAULTS[name].weight for name in MOMENTS)
    assert inside >= sum(fault.weight for fault in FAULTS.values()) * 0.4


def test_kinds_come_as_often_as_the_table_says() -> None:
    one, other = (list(islice(drawn(["kill one rank", "slow rank"], random.Random(seed)), 500)) for seed in (1, 1))
    counts = Counter(one)
    assert one == other and set(counts) == {"kill one rank", "slow rank"}
    assert counts["kill one rank"] > counts["slow rank"]
