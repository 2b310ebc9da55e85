from collections import Counter

from soak_parts.tally import Tally, table


def test_the_table_counts_what_happened() -> None:
    tally = Tally(Counter({"slow rank": 3, "kill one rank": 2}), Counter({"kill one rank": 2}), inside=1)
    tally.lost_steps, tally.useful_s, tally.wall_s = [1, 4], 30.0, 60.0
    rows = {line.split(" | ")[0].strip("| "): line for line in table({"a": tally, "b": Tally()}).splitlines()}
    assert rows["slow rank"] == "| slow rank | 3 (0) | 0 (0) |"
    assert rows["kill one rank"] == "| kill one rank | 2 (2) | 0 (0) |"
    assert rows["deaths"] == "| deaths | 2 | 0 |"
    assert rows["lost steps per death, mean"] == "| lost steps per death, mean | 2.5 | 0.0 |"
    assert rows["lost steps per death, most"] == "| lost steps per death, most | 4 | 0 |"
    assert rows["ETTR"] == "| ETTR | 0.50 | - |"
