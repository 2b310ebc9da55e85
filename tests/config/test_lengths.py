"""The curriculum of lengths: which step has which, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sgt.config import Config, parse_config
from megatron_sgt.config.lengths import LengthSpan, SequenceLengths, check_lengths
from megatron_sgt.errors import ConfigError

RISING = SequenceLengths(48, ends=(4, 6), shorter=(12, 24))


def test_every_step_has_the_length_of_its_entry_and_then_the_full_one() -> None:
    assert [RISING.at(step) for step in range(1, 9)] == [12, 12, 12, 12, 24, 24, 48, 48]
    assert [RISING.pieces_at(step) for step in (4, 5, 7)] == [4, 2, 1]
    assert [step for step in range(1, 99) if RISING.changes_at(step)] == [5, 7]
    assert RISING.every == (12, 24, 48)
    assert RISING.text() == "12 until step 4, 24 until step 6, then 48"


def test_without_a_curriculum_every_step_has_the_full_length() -> None:
    plain = SequenceLengths(48)
    assert {plain.at(step) for step in range(1, 9)} == {48} and not any(map(plain.changes_at, range(1, 9)))
    assert (plain.every, plain.text()) == ((48,), "")
    assert list(plain.within(3, 9)) == [LengthSpan(3, 9, 48)]


def test_an_entry_of_the_same_length_is_no_change() -> None:
    assert not SequenceLengths(48, (4, 6), (24, 24)).changes_at(5)


@pytest.mark.parametrize(("first", "last"), [(1, 9), (1, 4), (4, 5), (5, 6), (5, 5), (7, 9), (2, 7)])
def test_spans_divide_the_steps_without_gap_or_overlap(first: int, last: int) -> None:
    found = [
        (step, span.seq_length) for span in RISING.within(first, last) for step in range(span.first, span.last + 1)
    ]
    assert found == [(step, RISING.at(step)) for step in range(first, last + 1)]
    assert len(list(RISING.within(first, last))) == len({length for _, length in found})


def problems(ends: tuple[int, ...], shorter: tuple[int, ...], ranks: int = 1, sharer: str | None = None) -> list[str]:
    return list(check_lengths(SequenceLengths(48, ends, shorter), ranks, sharer))


def test_lengths_divide_the_full_one() -> None:
    where = "data.seq_length_curriculum"
    assert problems((4, 6), (10, 24)) == [
        f"{where}[0].seq_length: 10 does not divide model.seq_length 48; nearest that do: 8, 12"
    ]
    assert problems((4,), (96,)) == [
        f"{where}[0].seq_length: 96 does not divide model.seq_length 48; nearest that do: 48"
    ]
    assert problems((4,), (48,)) == [], "the full length is one, too"


def test_entries_end_one_after_the_other() -> None:
    expected = "data.seq_length_curriculum[1]: ends at step 4, which is not after step 4 where it begins"
    assert problems((4, 4), (12, 24)) == [expected]


def test_ranks_that_share_a_sequence_need_whole_shares() -> None:
    assert problems((4,), (6,), 4) == []
    assert problems((4,), (12,), 4, "parallel.sequence_parallel") == []
    (said,) = problems((4,), (6,), 4, "parallel.sequence_parallel")
    assert said.endswith("6 is not a multiple of tensor_model_parallel_size 4, which parallel.sequence_parallel needs")


def config(*entries: dict[str, Any], **parallel: Any) -> Config:
    shape = {"num_layers": 5, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48, "vocab_size": 64}
    train = {"train_iters": 10, "micro_batch_size": 2, "global_batch_size": 8}
    data = {"seq_length_curriculum": list(entries)}
    sections = {"model": {**shape, "seq_length": 32}, "train": train, "data": data, "parallel": parallel}
    return parse_config({**sections, "optim": {"lr": 1e-3}})


def test_tokens_are_counted_in_whole_steps_of_full_samples() -> None:
    made = config({"until_tokens": 1000, "seq_length": 8}, {"until_steps": 9, "seq_length": 16})
    assert made.tokens_per_step == 8 * 32
    assert made.seq_lengths == SequenceLengths(32, ends=(4, 9), shorter=(8, 16))
    assert parse_config(made.model_dump()) == made


@pytest.mark.parametrize(
    ("length", "parallel", "message"),
    [
        (3, {}, "3 does not divide model.seq_length 32; nearest that do: 2, 4"),
        (1, {}, "must be > 1, got 1"),
        (2, {"sequence_parallel": True}, "4, which parallel.sequence_parallel needs"),
        (2, {"loop_method": "balanced"}, "4, which parallel.loop_method balanced needs"),
    ],
)
def test_a_configuration_with_a_wrong_length_is_refused(length: int, parallel: dict[str, Any], message: str) -> None:
    ranks = 4 if parallel else 1
    with pytest.raises(ConfigError) as refused:
        config({"until_steps": 2, "seq_length": length}, tensor_model_parallel_size=ranks, **parallel)
    (line,) = str(refused.value).splitlines()
    assert "data.seq_length_curriculum[0].seq_length: " in line and line.endswith(message)


def test_the_curriculum_of_deepspeed_is_refused_with_the_name_of_ours() -> None:
    values = config({"until_steps": 2, "seq_length": 8}).model_dump()
    with pytest.raises(ConfigError, match=r"deepspeed.curriculum_learning: is refused.* data.seq_length_curriculum$"):
        parse_config({**values, "deepspeed": {"curriculum_learning": {"enabled": True}}})
