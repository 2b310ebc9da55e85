"""The text of a search: each row with its reasons and settings, in the width of a terminal."""

from __future__ import annotations

import json

import pytest

from megatron_sgt.planning.render import WIDTH
from megatron_sgt.planning.render_search import render_search, search_numbers
from megatron_sgt.planning.search import search
from tests.planning.test_search import example, run


def text_of(memory: float, ranks: int = 4, node: int = 2) -> str:
    numbers = search_numbers(search(run(memory, ranks, node), told=3))
    assert json.loads(json.dumps(numbers)) == numbers
    text = render_search(numbers, example(), "layouts")
    assert all(len(line) <= WIDTH for line in text.splitlines())
    return " ".join(text.split())


def test_each_row_says_what_its_time_and_memory_consist_of_and_what_to_set() -> None:
    text = text_of(5e9)
    assert text.count("step: products ") == text.count("; growth makes it +") == 3
    assert text.count("% of 5.26 GB") == 4 and "micro-batches in flight" in text
    assert "up to 95 % of the 5.26 GB usable" in text
    assert "parallel.pipeline_model_parallel_size=2" in text
    assert "does not fit: " in text and "faster than the first" in text


def test_where_nothing_fits_it_says_so() -> None:
    text = text_of(1e9)
    assert "no layout fits; the one that needs least needs " in text and "from the start" in text


def test_what_bursts_only_after_growth_is_told_so() -> None:
    best = search(run(80e9, 1, 1), told=1).best[0]
    between = (best.peak_before_growth() + best.fullest.total) / 2
    assert "only after growth (" in text_of(between, 1, 1)


@pytest.mark.parametrize("name", ["pipeline_parallel", "zero_stage", "accumulation", "tokens_per_second", "overrides"])
def test_the_numbers_have_what_a_program_needs(name: str) -> None:
    assert name in search_numbers(search(run(5e9), told=1))["layouts"][0]
