"""The bench of a training step: grown against vanilla, vanilla against transformers' Llama of the same shape."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.commands import run_script

SHAPE = "--layers 4 --hidden 32 --heads 2 --ffn 48 --seq 16 --vocab 120 --loop-layers 1 --loop-heads 1"


@pytest.mark.parametrize(
    ("arguments", "first", "second"),
    [("--peer transformers", "transformers", "vanilla"), ("", "vanilla", "grown")],
)
def test_both_kinds_of_pairs(arguments: str, first: str, second: str, tmp_path: Path) -> None:
    line = f"{SHAPE} --pairs 2 --threads 1 --device cpu {arguments}"
    done = run_script("tools/bench/step_overhead.py", line.split(), tmp_path)
    assert done.code == 0, done.err
    for name in ("step time", "CPU time"):
        found = re.search(rf"{name}, median +([\d.]+) ms {first} +([\d.]+) ms {second}", done.out)
        assert found is not None and all(float(value) > 0 for value in found.groups()), done.out
        assert f"{name} ratio, median of 2 pairs" in done.out
    assert ("FLOPs overhead" in done.out) is not bool(arguments)
