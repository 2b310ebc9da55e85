"""Jobs run some at a time, are stopped with the slice, go on in the next one, and fail loudly. The jobs are small
programs that act like a run: they save and leave with 75 on SIGTERM, and write what a finished run writes."""

import sys
from pathlib import Path

import pytest
from study_parts.runner import Job, run_jobs

from megatron_sgt.errors import SGTError

FINISHED = '{"kind":"train","step":1,"train_iters":1,"loss":1.0,"step_time_s":1.0,"model_flops_per_step":1.0}'
PROGRAM = f"""
import pathlib, signal, sys, time
folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
def stop(*_):
    (folder / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(folder / f"started{{len(list(folder.glob('started*')))}}").write_text(str(time.time()))
if (folder / "saved").exists():
    seconds = 0.0
time.sleep(seconds)
if seconds < 0.2:
    (folder / "metrics.jsonl").write_text('''{FINISHED}\\n{{"kind":"valid","step":1,"loss":1.0}}\\n''')
"""


def job(folder: Path, name: str, seconds: float, program: str = PROGRAM) -> Job:
    run_dir = folder / name
    return Job(name, 1, run_dir, (sys.executable, "-c", program, str(run_dir), str(seconds)))


def test_a_slice_stops_and_the_next_goes_on(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "quick", 0.1), job(tmp_path, "slow", 60.0), job(tmp_path, "waiting", 0.1)]
    told: list[str] = []
    left = run_jobs(jobs, 1, 1.5, told.append)
    assert [j.preset for j in left] == ["slow", "waiting"] and (tmp_path / "slow" / "saved").exists()
    assert any("slow, seed 1: stopped with code 75" in line for line in told)
    assert not (tmp_path / "waiting").exists()
    assert run_jobs(jobs, 1, None, told.append) == []
    assert len(list((tmp_path / "quick").glob("started*"))) == 1  # what is finished is not started again


def test_some_at_a_time(tmp_path: Path) -> None:
    jobs = [job(tmp_path, str(n), 0.15) for n in range(3)]
    assert run_jobs(jobs, 3, None, lambda line: None) == []
    starts = sorted(float((tmp_path / str(n) / "started0").read_text()) for n in range(3))
    assert starts[-1] - starts[0] < 5.0


def test_a_run_that_fails_stops_the_study(tmp_path: Path) -> None:
    bad = job(tmp_path, "bad", 0.0, "import sys; sys.exit('no such data')")
    jobs = [job(tmp_path, "other", 60.0), bad]
    with pytest.raises(SGTError, match="bad, seed 1 ended with code 1") as caught:
        run_jobs(jobs, 2, None, lambda line: None)
    assert "no such data" in str(caught.value)
