from pathlib import Path

from megatron_sgt.data.listing import counted, list_left_out, listed


def test_lists() -> None:
    assert listed(["a", "b", "c"]) == "a, b, c" and listed("abcde") == "a, b, c and 2 more"
    assert (counted(1, "file"), counted(2000, "file")) == ("1 file", "2,000 files")
    unknown = [Path(f"a.jsonl.{suffix}") for suffix in ("LZ4", "LZ4", "tmp")] + [Path("x/LICENSE")]
    others = [(Path("d/.git"), "hidden"), (Path("d/l"), "broken link"), (Path("d/m"), "broken link")]
    assert list_left_out(unknown, [Path("d/README.md")], others) == (
        "2 .jsonl.LZ4, 1 .tmp, 1 without suffix (LICENSE), 1 side file of a data set (README.md), "
        "2 broken links (d/l, d/m), 1 hidden (.git)"
    )
    many = list_left_out([Path(f"a.{i}") for i in range(12)], [], [])
    assert many.startswith("1 .0, 1 .1, ") and many.endswith(", 2 with other suffixes")
