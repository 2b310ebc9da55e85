"""The text of a search: each row with its reasons and settings, in the width of a terminal."""

from __future__ import annotations

import json
import re

import pytest

from megatron_sgt.planning.render import WIDTH
from megatron_sgt.planning.render_search import overrides, render_search, search_numbers
from megatron_sgt.planning.search import search
from tests.planning.test_search import example, run


def text_of(memory: float, ranks: int = 4, node: int = 2, *settings: str) -> str:
    numbers = search_numbers(search(run(memory, ranks, node, *settings), told=3))
    assert json.loads(json.dumps(numbers)) == numbers
    text = render_search(numbers, example(), "layouts")
    assert all(len(line) <= WIDTH for line in text.splitlines())
    return " ".join(text.split())


def test_each_row_says_what_its_time_and_memory_consist_of_and_what_to_set() -> None:
    text = text_of(5e9)
    assert text.count("step: products ") == text.count("; growth makes it +") == 3 and "+0.0 % longer" not in text
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


def test_long_runs_keep_their_columns_apart_and_what_adds_nothing_is_left_out() -> None:
    numbers = search_numbers(search(run(5e9), told=1))
    (row,) = numbers["layouts"]
    row.update(days=12_345.6, tokens_per_second=999_000.0, peak=999e9, step=1234.0, step_before_growth=1233.9)
    lines = render_search(numbers, example(), "layouts").splitlines()
    (cells,) = [line.split() for line in lines if "12,346" in line]
    assert cells[-8:] == ["1.23e+03", "s", "999", "k", "12,346", "days", "999", "GB"]
    assert all(len(line) <= WIDTH for line in lines) and "longer" not in "".join(lines)


def test_the_layout_of_the_file_stands_beside_the_first() -> None:
    here = run(8e9, 4, 2, "train.precision=bf16")
    (best,) = search(here, told=1).best
    same = run(8e9, 4, 2, *overrides(best))
    numbers = search_numbers(search(same, told=1))
    own = numbers["configured"]
    assert own["step"] == numbers["layouts"][0]["step"] and own["peak"] == best.fullest.total
    assert f" {best.time.total:.3g} s (+0 %), " in render_search(numbers, example(), "layouts")
    assert "this file's layout: TP 1 x PP 1 x DP 4, ZeRO 1, micro 2, recompute none: " in text_of(5e9)
    assert re.search(r"this file's layout: .* GB, which does not fit$", text_of(1e9))


def test_a_layout_of_the_file_with_a_cut_of_its_own() -> None:
    written = ("parallel.pipeline_model_parallel_size=2", "parallel.pipeline_model_parallel_layout='5,1'")
    numbers = search_numbers(search(run(12e9, 4, 2, *written), told=1))
    assert numbers["configured"]["pipeline_layout"] == "5,1"
    auto = search_numbers(search(run(12e9, 4, 2, written[0]), told=1))["configured"]
    assert auto["pipeline_layout"] != "5,1" and auto["step"] < numbers["configured"]["step"]


def test_a_layout_that_the_ranks_cannot_have_is_told_with_the_reason() -> None:
    text = text_of(12e9, 4, 4, "parallel.pipeline_model_parallel_size=3")
    assert "this file's layout: not on 4 GPUs: parallel: tensor_model_parallel_size 1 x pipeline_model_" in text
