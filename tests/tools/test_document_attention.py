"""The bench of attention in documents prints a ratio for every layout."""

import re
from pathlib import Path

from tests.helpers.commands import run_script


def test_every_layout_is_measured(tmp_path: Path) -> None:
    sizes = {"length": 96, "document": 32, "batch": 2, "heads": 1, "head-size": 8, "repeats": 1}
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    done = run_script("tools/bench/document_attention.py", arguments, tmp_path)
    assert done.code == 0, done.err
    found = re.findall(r"^(.+?) +[\d.]+ ms +[\d.]+ x causal  pairs +([\d.]+)$", done.out, re.MULTILINE)
    assert [name for name, _ in found] == [
        "documents of 32",
        "uneven documents",
        "documents of 37",
        "one document",
        "one document, 1 token of padding",
    ]
    assert float(dict(found)["documents of 32"]) == 0.34  # 3 · 32 · 33 of 96 · 97
    assert float(dict(found)["one document"]) == 1.0
