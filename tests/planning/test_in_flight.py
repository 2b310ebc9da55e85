"""What waits for its backward pass on each stage: closed forms, and that the beginning of a step meets all of it.

Real passes of two pipeline stages, counted: ``test_rank_memory.py``.
"""

from __future__ import annotations

import pytest

from megatron_sgt.planning.in_flight import Pass, moments, most_in_flight, passes


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8, 40])
def test_1f1b_has_the_smaller_of_micro_batches_and_stages_behind(micro_batches: int) -> None:
    assert [most_in_flight(4, 1, stage, micro_batches) for stage in range(4)] == [
        min(micro_batches, 4 - stage) for stage in range(4)
    ]


@pytest.mark.parametrize(
    ("size", "virtual", "micro_batches"), [(2, 2, 2), (4, 2, 4), (4, 2, 16), (4, 3, 8), (8, 5, 64)]
)
def test_interleaved_has_chunks_of_several_rounds(size: int, virtual: int, micro_batches: int) -> None:
    assert [most_in_flight(size, virtual, stage, micro_batches) for stage in range(size)] == [
        min(micro_batches * virtual, 2 * (size - stage - 1) + (virtual - 1) * size + 1) for stage in range(size)
    ]


def test_every_chunk_passes_forward_and_backward_once_per_micro_batch() -> None:
    for stage in range(4):
        done = list(passes(4, 2, stage, 8))
        assert all(done.count(Pass(forward, chunk)) == 8 for forward in (True, False) for chunk in (0, 1))


def test_without_a_pipeline_one_micro_batch_is_there_at_a_time() -> None:
    assert list(passes(1, 1, 0, 2)) == [Pass(True, 0), Pass(False, 0)] * 2
    assert moments(1, 1, 0, 64) == (((1,), 0),)


def test_the_output_layer_of_the_last_stage_serves_one_micro_batch_at_a_time() -> None:
    """Its logits would be the largest tensors of all."""
    for virtual in (1, 2, 3):
        assert max(flying[-1] for flying, _ in moments(4, virtual, 3, 16)) == 1


@pytest.mark.parametrize(("size", "virtual"), [(2, 1), (8, 1), (2, 4), (4, 2), (3, 3)])
def test_three_rounds_meet_all_that_a_long_step_meets(size: int, virtual: int) -> None:
    for stage in range(size):
        counted, flying = set(), [0] * virtual
        for forward, chunk in passes(size, virtual, stage, 12 * size):
            if not forward:
                counted.add((tuple(flying), chunk))
            flying[chunk] += 1 if forward else -1
        assert set(moments(size, virtual, stage, 12 * size)) == counted
