"""Signals reach a run whose main thread is stuck, and end it when it does not stop. Each case is a process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sgt.config import TrainConfig
from megatron_sgt.errors import ExitCode
from megatron_sgt.guard import signals
from megatron_sgt.guard.signals import listening
from megatron_sgt.guard.stop import Reason, StopRequests
from tests.helpers.ranks import start_server

REPEAT_S = 0.3
_context = multiprocessing.get_context("forkserver")


def requests() -> StopRequests:
    return StopRequests(TrainConfig(train_iters=1, micro_batch_size=1, global_batch_size=1))


def steps(stop: StopRequests) -> None:
    """A run that does what it is asked, after a second."""
    while not stop.pending():
        time.sleep(0.01)
    time.sleep(1)


def stuck(stop: StopRequests) -> None:
    """A main thread that waits in C and never comes back to the interpreter, as in a collective."""
    c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    c.pthread_mutex_lock(mutex)
    c.pthread_mutex_lock(mutex)


def stuck_in_save(stop: StopRequests) -> None:
    steps(stop)
    stop.on_agreed(stop.pending())
    stuck(stop)


def _main(body: Callable[[StopRequests], None], grace: float, training: bool, err: str, ready: object) -> None:
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
    signals.REPEAT_S = REPEAT_S
    stop = requests()
    with listening(stop, grace):
        stop.training = training
        ready.set()  # type: ignore[attr-defined]
        body(stop)
    os._exit(stop.pending())


class Run:
    """A process that listens, and then does ``body``."""

    def __init__(
        self, folder: Path, body: Callable[[StopRequests], None], grace: float = 60.0, training: bool = True
    ) -> None:
        start_server()
        self.err = folder / "err"
        ready = _context.Event()
        self.process = _context.Process(target=_main, args=(body, grace, training, str(self.err), ready))
        self.process.start()
        assert ready.wait(30)

    def send(self, *signums: int, pause: float = 0.0) -> Run:
        for signum in signums:
            os.kill(self.process.pid or 0, signum)
            time.sleep(pause)
        return self

    def end(self) -> tuple[int | None, str]:
        self.process.join(30)
        return self.process.exitcode, self.err.read_text()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_request(signum: int, tmp_path: Path) -> None:
    assert Run(tmp_path, steps).send(signum).end() == (Reason.of(signum), "")


def test_what_a_launcher_passes_on_at_once_is_no_second_request(tmp_path: Path) -> None:
    several = (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
    assert Run(tmp_path, steps).send(*several, pause=0.02).end() == (Reason.SIGINT, "")


def test_two_that_wait_together_are_told_in_either_order(tmp_path: Path) -> None:
    """The kernel runs the handlers of signals that wait together in reverse; stopping the process makes them."""
    run = Run(tmp_path, steps).send(signal.SIGSTOP)
    assert run.send(signal.SIGINT, signal.SIGTERM, signal.SIGCONT).end() == (Reason.SIGINT, "")


def test_a_second_request_forces_the_exit_also_of_a_stuck_process(tmp_path: Path) -> None:
    run = Run(tmp_path, stuck).send(signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, pause=REPEAT_S + 0.1)
    code, err = run.end()
    assert code == ExitCode.FORCED and "forced exit: SIGTERM came again" in err


@pytest.mark.parametrize("body", [stuck, stuck_in_save])
def test_a_step_or_a_save_that_hangs_is_ended_with_its_stacks(
    body: Callable[[StopRequests], None], tmp_path: Path
) -> None:
    """The save has a grace time of its own: the step before it takes a second here."""
    begun = time.monotonic()
    code, err = Run(tmp_path, body, grace=1.5).send(signal.SIGTERM).end()
    assert code == ExitCode.FORCED and "has not stopped 1.5 s after the request (SIGTERM)" in err
    assert "in stuck" in err, "where it hangs is shown"
    assert time.monotonic() - begun > (2.5 if body is stuck_in_save else 1.5)


def test_ctrl_c_interrupts_a_start(tmp_path: Path) -> None:
    _, err = Run(tmp_path, steps, training=False).send(signal.SIGINT).end()
    assert "KeyboardInterrupt" in err


def test_a_scheduler_that_warns_during_the_start_is_heard(tmp_path: Path) -> None:
    assert Run(tmp_path, steps, training=False).send(signal.SIGUSR1).end() == (Reason.SIGUSR1, "")


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening(requests(), 60):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_everything_is_as_before_afterwards() -> None:
    before = [signal.getsignal(signum) for signum in signals.SIGNALS]
    asked = requests()
    with listening(asked, 60):
        os.kill(os.getpid(), signal.SIGUSR1)
        while not asked.pending():
            time.sleep(0.01)
    assert [signal.getsignal(signum) for signum in signals.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
