import signal
from collections.abc import Callable

import pytest

from megatron_sgt.config import TrainConfig
from megatron_sgt.guard import stop
from megatron_sgt.guard.stop import StopRequests

TRAIN = {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1}


class Clock:
    """Seconds since the epoch, as set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def requests(clock: Callable[[], float], job_end: float | None = None, **train: float) -> StopRequests:
    return StopRequests(TrainConfig(**TRAIN, **train), job_end, clock)


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("order", [1, -1])
def test_a_launchers_answer_does_not_hide_what_it_answers(signum: int, order: int) -> None:
    asked = requests(Clock())
    assert not asked.pending()
    for one in (signum, signal.SIGTERM)[::order]:
        asked.receive(one)
    assert stop.named(asked.pending()) == signal.Signals(signum).name


def test_a_signal_says_more_than_a_limit() -> None:
    asked = requests(Clock(), job_end=0.0)
    asked.receive(signal.SIGTERM)
    assert stop.named(asked.pending()) == "SIGTERM"


def test_the_duration_is_that_of_this_process() -> None:
    clock = Clock()
    asked = requests(clock, exit_duration_minutes=1.5)
    clock.now += 89
    assert not asked.pending()
    clock.now += 1
    assert stop.named(asked.pending()) == "train.exit_duration_minutes"


@pytest.mark.parametrize(("longest_save", "margin"), [(0.0, 120.0), (30.0, 150.0)])
def test_the_end_of_the_job_leaves_time_for_a_save(longest_save: float, margin: float) -> None:
    clock = Clock()
    asked = requests(clock, job_end=clock.now + 600)
    for seconds in (longest_save, longest_save / 2):
        asked.note_save(seconds)
    clock.now += 600 - margin - 1
    assert not asked.pending()
    clock.now += 1
    assert "Slurm" in stop.named(asked.pending())


def test_saves_of_a_larger_model_are_left_more_time() -> None:
    clock = Clock()
    asked = requests(clock, job_end=clock.now + 600)
    asked.note_save(30.0)
    asked.expect_saves(4.0)
    asked.note_save(100.0)
    clock.now += 600 - 120 - 4 * 30 - 1
    assert not asked.pending()
    clock.now += 1
    assert "Slurm" in stop.named(asked.pending())
