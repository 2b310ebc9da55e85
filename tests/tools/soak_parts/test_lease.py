"""That a broken lease would be seen; the faults themselves strike real runs in test_run.py."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from soak_parts import lease
from soak_parts.aim import Aim, Left
from soak_parts.running import Lost, Running
from soak_parts.workload import LAYOUTS, small_config

from megatron_sgt.jsonl import JsonlWriter
from megatron_sgt.metrics import METRICS_FILE

AIM = Aim(0, 0.0, random.Random(1))
REFUSED = "error: the run is held by another\n"


class FakeRanks:
    """Ranks that leave with a code, and do something when they are continued."""

    def __init__(self, code: int = 4, on_continue: Callable[[], object] = lambda: None) -> None:
        self.code, self.on_continue, self.armed = code, on_continue, [0] * 4

    def alive(self) -> bool:
        return True

    def send(self, number: signal.Signals, *ranks: int) -> None:
        if number is signal.SIGCONT:
            self.on_continue()

    def freeze(self) -> None:
        pass

    def first_code(self, patience: float) -> int:
        return self.code


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Running:
    """A run at step 8 that takes 8 steps whenever it is waited for."""
    run = Running(small_config(tmp_path / "run", "data", LAYOUTS["dp2-zero1"], {}), 0.0)
    run.root.mkdir(parents=True)
    (run.root / "latest").write_text("global_step8")
    (run.root / "global_step4.removed.tmp").mkdir()
    (run.root / "global_step4.removed.tmp" / "a").touch()
    run.ranks = FakeRanks()
    monkeypatch.setattr(run, "wait_steps", lambda count: True)
    monkeypatch.setattr(lease, "LEASE_TIMEOUT", 0.0)
    return run


@pytest.mark.parametrize(
    ("code", "said", "fine"),
    [
        (4, REFUSED, True),
        (0, REFUSED, False),
        (1, REFUSED, False),
        (4, "error: no checkpoint\n", False),
    ],
)
def test_a_second_start_must_be_refused(
    code: int, said: str, fine: bool, run: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(config: Path, log: Path) -> FakeRanks:
        log.write_text(said)
        return FakeRanks(code)

    monkeypatch.setattr(lease, "Ranks", start)
    if fine:
        assert lease.second_start(run, AIM) is Left.ALIVE
    else:
        with pytest.raises(Lost, match="a second start ended"):
            lease.second_start(run, AIM)


@pytest.mark.parametrize(
    "what", ["fine", "code", "checkpoint", "metrics", "one record under way", "two records", "deleted", "leftover"]
)
def test_a_stopped_holder_must_write_nothing(what: str, run: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def awake() -> None:
        if what == "checkpoint":
            (run.root / "latest").write_text("global_step8")  # the same bytes again
        elif what in ("metrics", "one record under way", "two records"):
            run.run_dir.mkdir(exist_ok=True)
            writer = JsonlWriter(run.run_dir / METRICS_FILE)
            for step in (8, 9)[: 2 if what == "two records" else 1]:
                writer.write("train", {"step": step, "time": time.time() if what == "metrics" else 0.0})
        elif what == "deleted":
            (run.root / "latest").unlink()
        elif what == "leftover":
            (run.root / "global_step4.removed.tmp" / "a").unlink()

    run.ranks = former = FakeRanks(1 if what == "code" else 4, awake)
    monkeypatch.setattr(Running, "start_ranks", lambda run: setattr(run, "ranks", FakeRanks()))
    monkeypatch.setattr(run, "hold_at", lambda moment, rank, rng: rank)
    assert lease.stopped_holder(run, AIM) is Left.DYING
    assert run.stopped is former and run.end() == []
    if what in ("fine", "one record under way", "leftover"):
        run.start()
        assert run.stopped is None and run.ranks is not former
    else:
        with pytest.raises(Lost, match="a stopped holder went on to"):
            run.start()


@pytest.mark.parametrize("seconds", [0.1, lease.AT_ONCE + 1])
def test_a_killed_holder_must_not_be_waited_for(seconds: float, run: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(run: Running) -> None:
        run.run_dir.mkdir(exist_ok=True)
        JsonlWriter(run.run_dir / METRICS_FILE).write("resume", {"step": 8, "time": time.time() + seconds})

    monkeypatch.setattr(Running, "start_ranks", start)
    assert lease.killed_holder(run, AIM) is Left.DYING
    if seconds < lease.AT_ONCE:
        run.start()
        assert run.step() == 8
    else:
        with pytest.raises(Lost, match="went on after"):
            run.start()
