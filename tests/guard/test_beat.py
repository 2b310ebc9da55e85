"""What can be read from the beats of all ranks."""

from __future__ import annotations

import dataclasses

from megatron_sgt.guard.beat import Beat, Listener, behind, dead_ranks, in_earlier_step, next_visible
from megatron_sgt.guard.progress import Mark
from megatron_sgt.lease.process import Identity, own_identity

BEAT = Beat.of(3, Mark("train", 7, 40, 1.0, True), oom_kills=0, shm=0.5)


def test_a_beat_is_a_line_of_text() -> None:
    assert Beat.from_text(BEAT.text()) == BEAT
    assert BEAT.place == "step 7 (train)"


def test_silence_counts_from_the_last_new_beat() -> None:
    listener = Listener()
    assert listener.silent_seconds(5, 100.0) == 0
    listener.hear(5, BEAT, 10.0)
    listener.hear(5, BEAT, 40.0)
    assert listener.silent_seconds(5, 70.0) == 60
    listener.hear(5, dataclasses.replace(BEAT, number=4), 71.0)
    assert listener.silent_seconds(5, 72.0) == 1


def test_an_ordinary_step_bears_less_silence_than_a_slow_phase() -> None:
    """Waiting at the store ends by itself for no collective's sake: a lost node has to be noticed there too."""
    listener = Listener()
    assert not listener.is_lost(5, 1e6), "never heard"
    for rank, quick in ((5, True), (6, False)):
        listener.hear(rank, dataclasses.replace(BEAT, quick=quick), 0.0)
    assert [listener.is_lost(rank, 59.0) for rank in (5, 6)] == [False, False]
    assert [listener.is_lost(rank, 61.0) for rank in (5, 6)] == [True, False]
    assert [listener.is_lost(rank, 601.0) for rank in (5, 6)] == [True, True]


def test_everyone_on_a_host_is_kept_an_eye_on() -> None:
    hosts = [Identity(host, host, 100 + n, 1) for n, host in enumerate("aabbcaa")]
    assert [next_visible(rank, hosts) for rank in range(7)] == [1, 5, 3, 2, None, 6, 0]


def test_dead_ranks() -> None:
    own = own_identity()
    ranks = [
        own,
        dataclasses.replace(own, start=1),
        dataclasses.replace(own, space="elsewhere", start=1),
        own,
    ]
    assert dead_ranks(ranks, 0) == [1]


def test_who_is_behind() -> None:
    def beats(*counts: int) -> dict[int, Beat]:
        return {rank: dataclasses.replace(BEAT, count=count) for rank, count in enumerate(counts)}

    assert behind(beats(40, 38, 40, 38), [0] * 4) == [1, 3]
    assert behind(beats(40, 40), [0, 0]) == []
    assert behind({}, []) == []


def test_stages_of_a_pipeline_are_not_compared_with_each_other() -> None:
    """The second stage begins a micro-batch after the first one; its ranks, as those of the first, do it together."""
    counts, stages = [44, 44, 41, 41], [0, 0, 1, 1]
    heard = {rank: dataclasses.replace(BEAT, count=count) for rank, count in enumerate(counts)}
    assert behind(heard, stages) == [] and in_earlier_step(heard) == []
    heard[3] = dataclasses.replace(BEAT, count=40)
    assert behind(heard, stages) == [3]
    heard[1] = dataclasses.replace(BEAT, count=44, step=6)
    assert in_earlier_step(heard) == [1]
