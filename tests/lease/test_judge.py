"""Whether a holder is gone, alive or to be watched, and for how long."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_sgt.lease import lease_file
from megatron_sgt.lease.holder import Holder
from megatron_sgt.lease.judge import Judgement, Verdict, judge, shows_life
from megatron_sgt.lease.process import process_state
from megatron_sgt.lease.scheduler import Job
from tests.helpers.leases import elsewhere, identity_of, write

LIMIT = 100.0


def judged(folder: Path, holder: Holder, age: float = 0.0) -> Judgement:
    path = write(folder, holder, age)
    seen = lease_file.read(path)
    assert seen is not None
    judgement = judge(path, seen, Holder.here("a run", LIMIT))
    assert os.listdir(folder) == [path.name]
    return judgement


@pytest.mark.parametrize(
    ("age", "seconds"),
    [(0, 100), (40, 60), (90, 25), (101, 25), (3600, 25), (-3600, 100)],
)
def test_another_host_is_watched_for_what_is_left_or_three_signs_of_life(
    age: float, seconds: float, tmp_path: Path
) -> None:
    """Where its clock is an hour ahead or behind, too: its lease is never taken over without being watched."""
    judgement = judged(tmp_path, elsewhere(), age)
    assert judgement.verdict is Verdict.SILENT and judgement.seconds == pytest.approx(seconds, abs=2)


def test_the_longer_of_two_patiences_counts(tmp_path: Path) -> None:
    assert judged(tmp_path, elsewhere(timeout=500.0)).seconds == pytest.approx(500, abs=2)


def test_the_same_number_in_another_space_is_no_proof(tmp_path: Path) -> None:
    """After a restart of the machine, or in another container of it."""
    own = identity_of(os.getpid())
    for process in (
        dataclasses.replace(own, space="another boot/pid:[1]"),
        dataclasses.replace(own, pid=1, space=own.space + "0"),
        dataclasses.replace(own, pid=2**22 + 1, space=""),
    ):
        assert judged(tmp_path, elsewhere(process=process)).verdict is Verdict.SILENT


def test_a_process_of_this_machine(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        holder = elsewhere(process=identity_of(process.pid))
        assert judged(tmp_path, holder) == Judgement(Verdict.ALIVE)
        assert judged(tmp_path, holder, age=200) == Judgement(Verdict.SILENT, seconds=LIMIT), (
            "busy, or its disk is full"
        )
        process.send_signal(signal.SIGSTOP)
        while process_state(holder.process) != "T":
            time.sleep(0.01)
        stopped = [judged(tmp_path, holder, age) for age in (0, 101, -3600)]
        process.kill()
        assert [one.verdict for one in stopped] == [Verdict.ALIVE, Verdict.GONE, Verdict.GONE]
        assert all("stopped" in one.reason for one in stopped)
        process.wait()
        assert judged(tmp_path, holder) == Judgement(Verdict.GONE), "nobody need be told"
        reused = dataclasses.replace(identity_of(os.getpid()), start=1)
        assert judged(tmp_path, elsewhere(process=reused)).verdict is Verdict.GONE


def test_who_has_left_the_folder_or_is_this_process(tmp_path: Path) -> None:
    assert judged(tmp_path, elsewhere(left=True)).verdict is Verdict.GONE
    assert judged(tmp_path, elsewhere(process=identity_of(os.getpid()))).verdict is Verdict.GONE


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("echo RUNNING", Verdict.ALIVE),
        ("echo COMPLETED", Verdict.GONE),
        ("true", Verdict.SILENT),
        ("exit 1", Verdict.SILENT),
    ],
)
def test_slurm_is_asked_for_a_job_elsewhere(
    answer: str, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "bin/squeue").write_text(f"#!/bin/bash\n{answer}\n")
    (tmp_path / "bin/squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    judgement = judged(tmp_path / "run", elsewhere(job=Job("Slurm", "7")))
    assert judgement.verdict is verdict and ("Slurm" in judgement.reason) == (verdict is not Verdict.SILENT)


def test_signs_of_life(tmp_path: Path) -> None:
    path = write(tmp_path, elsewhere())
    seen = lease_file.read(path)
    assert seen is not None
    assert not shows_life(path, seen, 0.1)
    os.utime(path, (1, 1))
    assert shows_life(path, seen, 10)
    seen = lease_file.read(path)
    path.unlink()
    assert seen is not None and shows_life(path, seen, 10), "given back"
