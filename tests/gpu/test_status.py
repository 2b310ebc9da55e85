"""docs/gpu-status.md names every branch that a GPU alone executes, and how it is exercised without one."""

import json
import re
from pathlib import Path

from tests.gpu.branches import ROOT, places
from tests.gpu.status import HOW, PAGE, page, ran, summary, table


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.gpu.status"


def test_the_first_screen_of_the_readme_says_it() -> None:
    assert summary() in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())[:1500]


def test_every_place_is_in_the_table_and_nothing_else() -> None:
    rows = table()
    assert sorted(set(places()) - set(rows)) == [], "places that branches.yaml lacks"
    assert sorted(set(rows) - set(places())) == [], "places that are no more"


def test_every_row_says_how_and_by_what() -> None:
    parts = {"", *re.findall(r'"(\w+)"', (ROOT / "tools/bench/gpu_parts/rows.py").read_text())}
    for place, row in table().items():
        assert row.keys() <= {"what", "how", "by", "part"} and row["how"] in HOW, place
        assert row.get("part", "") in parts, place
        if row["how"] != "never":
            file, test = row["by"].split("::")
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), place


def test_results_of_the_suite_count(tmp_path: Path) -> None:
    for day, error in (("2026-01-02-030405", None), ("2026-02-03-040506", "out of memory")):
        rows = [
            {"row": "a", "part": "training", "seconds": 1.0, "error": error},
            {"row": "b", "part": "library", "seconds": 1.0, "error": None},
        ]
        result = {"about": {"device": "NVIDIA H100"}, "rows": rows}
        (tmp_path / f"nvidia-h100-{day}.json").write_text(json.dumps(result))
    assert ran(tmp_path) == {"training": "NVIDIA H100, 2026-01-02", "library": "NVIDIA H100, 2026-02-03"}
    assert "NVIDIA H100, 2026-02-03" in page(tmp_path)
    assert "Nothing here has run on a GPU yet" in page(tmp_path / "none")
