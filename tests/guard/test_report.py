"""The words of a failure: pure functions."""

from __future__ import annotations

import pytest

from megatron_sgt.guard.beat import Beat
from megatron_sgt.guard.report import (
    Failure,
    guess_error,
    guess_loss,
    is_consequence,
    is_timeout,
    state_words,
)


def beat(kills: int = 0, shm: float = 0.1) -> Beat:
    return Beat(1, "train", 7, 9, True, kills, shm)


def test_the_block() -> None:
    failure = Failure("lost", 3, "node7", "step 1,200 (train)", "the node node7 is lost, or its network")
    assert failure.block(16, "start again", ["also gone: rank 4 on node7"]).splitlines() == [
        "LOST  rank 3 of 16 on node7, in step 1,200 (train)",
        "  cause  the node node7 is lost, or its network",
        "  next   start again",
        "  also gone: rank 4 on node7",
    ]
    assert Failure.from_text(failure.text()) == failure


def test_the_block_of_a_hang_that_is_nobodys() -> None:
    failure = Failure("hang", None, "", "step 7 (train)", "no progress for 300 s")
    assert failure.block(16, "start again").splitlines()[0] == "HANG  all 16 ranks, in step 7 (train)"
    assert failure.who == "every rank" and Failure.from_text(failure.text()) == failure


@pytest.mark.parametrize(
    ("beats", "all_of_host", "words"),
    [
        ({"n1": [beat(), beat(kills=2)]}, False, "OOM killer: n1 ran out of memory (2 processes"),
        ({"n1": [beat(shm=0.97)]}, False, "/dev/shm of n1 is 97% full"),
        ({"n1": [beat()], "n2": [beat(kills=5)]}, True, "the node n1 is lost"),
        ({}, False, "SIGKILL"),
    ],
)
def test_why_a_process_is_gone(beats: dict[str, list[Beat]], all_of_host: bool, words: str) -> None:
    assert words in guess_loss("n1", beats, all_of_host)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "lower train.micro_batch_size"),
        (MemoryError(), "lower train.micro_batch_size"),
        (RuntimeError("unable to write to file </torch_1> in /dev/shm"), "/dev/shm: make it larger"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed"), "a data worker died"),
        (KeyError("x"), "KeyError: 'x' (its traceback"),
    ],
)
def test_why_a_rank_failed(error: Exception, words: str) -> None:
    assert words in guess_error(error)


@pytest.mark.parametrize(
    ("text", "consequence", "timeout"),
    [
        ("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9", True, False),
        ("[../gloo/transport/tcp/buffer.cc:72] Timed out waiting 10000ms for recv operation", False, True),
        ("NCCL error: remote process exited or there was a network error, ncclRemoteError", True, False),
        ("mat1 and mat2 shapes cannot be multiplied", False, False),
    ],
)
def test_what_merely_says_that_a_peer_has_gone(text: str, consequence: bool, timeout: bool) -> None:
    error = RuntimeError(text)
    assert (is_consequence(error), is_timeout(error)) == (consequence, timeout)
    assert not is_consequence(ValueError(text)), "only what torch raises for its collectives"


def test_states() -> None:
    assert state_words("T").startswith("stopped by a signal")
    assert (state_words(None), state_words("S")) == ("gone", "")
