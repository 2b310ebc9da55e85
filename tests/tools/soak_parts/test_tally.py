from collections import Counter

from soak_parts.tally import Tally, tables, total


def rows(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in lines}


def test_the_tables_count_what_happened() -> None:
    one = Tally(Counter({"slow rank": 3, "kill one rank": 2}), Counter({"kill one rank": 2}), inside=1)
    one.lost_steps, one.useful_s, one.wall_s = [1, 4], 30.0, 60.0
    other = Tally(Counter({"kill one rank": 1}), Counter({"kill one rank": 1}), saves=7)
    shown = rows(tables({"a": {"sync": one, "async": Tally()}, "b": {"sync": other, "async": Tally()}}))
    assert shown["slow rank"] == ["3 (0)", "0 (0)"]
    assert shown["kill one rank"] == ["3 (3)", "0 (0)"]
    measures = shown["layout, saves"]
    assert dict(zip(measures, shown["a sync"], strict=True)) == {
        "deaths": "2", "of them inside a save": "1", "checkpoints saved": "0", "refused: disk full": "0", "lost": "0",
        "steps equal to the reference": "0", "lost steps per death": "2.5", "most": "4", "ETTR": "0.50",
        "minutes": "1.0",
    }  # fmt: skip
    assert shown["a async"][measures.index("ETTR")] == "-"
    assert [shown["all"][measures.index(name)] for name in ("deaths", "checkpoints saved")] == ["3", "7"]


def test_a_total_changes_none_of_its_parts() -> None:
    part = Tally(lost_steps=[1])
    assert total([part, part]).lost_steps == [1, 1] and part.lost_steps == [1]
