"""One layout: a reference run, then the same run through faults, checked after every death."""

import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.manifest import checksum_problems
from megatron_sgt.config import Config
from megatron_sgt.errors import ExitCode, SGTError
from megatron_sgt.jsonl import read_all
from megatron_sgt.metrics import METRICS_FILE
from soak_parts.faults import DAMAGES, FAULTS, damage, small_disk
from soak_parts.ranks import RANKS, Ranks
from soak_parts.tally import Tally
from soak_parts.workload import INTERVAL, LAYOUTS, STEPS, small_config, write_data

MEASURED = (
    "loss",
    "grad_norm",
    "lr",
    "consumed_samples",
    "ema_entropy",
    "loop_depth",
    "other_gates",
    "phase",
)
PATIENCE = 120.0
"""Seconds in which something must move."""


class Lost(SGTError):
    """Something that must never be lost was."""


class Soak:
    """One layout: a reference run, then the same run through faults until so many deaths have come."""

    measured = MEASURED

    def __init__(
        self,
        folder: Path,
        data: str,
        parallel: dict[str, Any],
        faults: dict[str, int],
        rng: random.Random,
        tally: Tally,
    ) -> None:
        self.folder, self.data, self.parallel = folder, data, parallel
        self.faults, self.rng, self.tally = faults, rng, tally
        self.reference, self.step_s = self._run_reference()

    def _config(self, run_dir: Path, **checkpoint: Any) -> tuple[Config, Path]:
        config = small_config(run_dir, self.data, self.parallel, checkpoint)
        path = self.folder / f"{run_dir.name}.yaml"
        path.write_text(config.to_yaml(), encoding="utf-8")
        return config, path

    def _run_reference(self) -> tuple[dict[int, dict[str, Any]], float]:
        config, path = self._config(self.folder / "reference")
        codes = Ranks(path, self.folder / "reference.log").end(600)
        if any(codes):
            raise Lost(f"the reference run ended with {codes}: {self._end_of('reference.log', 2000)}")
        records = [r for r in read_all(Path(config.logging.run_dir, METRICS_FILE), []) if r["kind"] == "train"]
        assert [r["step"] for r in records] == list(range(1, STEPS + 1))
        seconds = sorted(b["time"] - a["time"] for a, b in pairwise(records))
        return {r["step"]: {name: r.get(name) for name in self.measured} for r in records}, seconds[len(seconds) // 2]

    def run(self, deaths: int, progress: Callable[[str], None]) -> None:
        """Start the run again and again until so many deaths have come.

        Raises:
            Lost: with what was lost.
        """
        started, tally = time.monotonic(), self.tally
        while tally.deaths.total() < deaths:
            self._start_anew()
            while tally.deaths.total() < deaths and not self._live_and_die():
                progress(f"{tally.deaths.total()} deaths, {tally.inside} inside a save, at step {self._step()}")
                tally.wall_s = time.monotonic() - started

    def _start_anew(self) -> None:
        self.run_dir = self.folder / "run"
        shutil.rmtree(self.run_dir, ignore_errors=True)
        for entry in (self.folder / "disk").glob("*"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        config, self.config = self._config(
            self.run_dir, save=str(self.folder / "disk" / "checkpoints"), save_interval=INTERVAL, keep_last=3
        )
        self.root, self.read, self.expected_start = config.save_dir, 0, 0
        self.damaged: set[str] = set()
        self.saved = 0

    def _live_and_die(self) -> bool:
        """One start of the run, up to a death or its end. Returns whether the run is done."""
        self.ranks = Ranks(self.config, self.folder / "run.log")
        try:
            while True:
                kind, rank, fraction, steps = self._next_fault()
                if not self._wait_steps(steps):
                    kind = "no fault"
                    break
                self.tally.faults[kind] += 1
                if self._strike(kind, rank, fraction):
                    break
        finally:
            codes = self.ranks.end(3.0)
        done = codes == [0] * RANKS
        if kind == "no fault" and not done:
            raise Lost(f"the run ended by itself with {codes}:\n{self._end_of('run.log', 3000)}")
        if done and self._step() != STEPS:
            raise Lost(f"the run says that it is done at step {self._step()} of {STEPS}")
        self._check(kind, done)
        return done

    def _next_fault(self) -> tuple[str, int, float, int]:
        kind = self.rng.choices(list(self.faults), list(self.faults.values()))[0]
        return kind, self.rng.randrange(RANKS), self.rng.random(), self.rng.randint(1, 2 * INTERVAL)

    def _strike(self, kind: str, rank: int, fraction: float) -> bool:
        """Let the fault happen; returns whether the ranks are to end now."""
        if kind == "slow rank":
            self.ranks.send(signal.SIGSTOP, rank)
            time.sleep(1.5 * fraction)
            self.ranks.send(signal.SIGCONT, rank)
            return False
        if kind == "full disk":
            return self._fill_disk()
        if kind.startswith("SIG"):
            self.ranks.send(signal.Signals[kind.split()[0]], rank)
            codes = self.ranks.end(PATIENCE)
            if set(codes) not in ({ExitCode.SAVED}, {ExitCode.DONE}):
                raise Lost(f"after {kind} the ranks ended with {codes}:\n{self._end_of('run.log', 3000)}")
            return True
        if "save" in kind:
            self._wait(self._is_saving, poll=0.0005)
            if "late" in kind:
                self.ranks.send(signal.SIGSTOP, rank)
            time.sleep(fraction * self._save_seconds())
        else:
            time.sleep(fraction * self.step_s)
        self.ranks.send(signal.SIGKILL, *([rank] if "one rank" in kind else []))
        return True

    def _fill_disk(self) -> bool:
        """Leave less than a checkpoint of room for the length of two saves. Returns whether the run has ended."""
        ballast = self.folder / "disk" / "ballast"
        whole = [self.root / tag for tag in layout.finished_tags(self.root)]
        size = sum(layout.file_sizes(whole[-1]).values()) if whole else 0
        with ballast.open("wb") as stream:
            while (free := shutil.disk_usage(ballast.parent).free) > size // 2:
                with contextlib.suppress(OSError):  # a save that goes on takes room meanwhile
                    taken = os.fstat(stream.fileno()).st_size
                    os.posix_fallocate(stream.fileno(), taken, free - size // 2)
        ended = not self._wait_steps(2 * INTERVAL)
        ballast.unlink()
        return ended

    def _check(self, kind: str, done: bool) -> None:
        """After a death, or the end: what counts as a checkpoint is whole, and every step is the reference's."""
        reached = self._compare()
        finished = layout.finished_tags(self.root)
        if not done:
            self.tally.deaths[kind] += 1
            self.tally.inside += any(p.is_dir() and p.name not in finished for p in self.root.glob("*"))
        self.damaged = {t for t in self.damaged if t not in finished or checksum_problems(self.root / t)}
        whole = [tag for tag in finished if tag not in self.damaged]
        tracker = self.root / layout.LATEST_FILE
        latest = tracker.read_text(encoding="utf-8").strip() if tracker.exists() else ""
        newest = layout.step_of(latest)
        broken = [problem for tag in whole for problem in checksum_problems(self.root / tag)]
        nowhere = latest and latest not in finished and latest not in self.damaged
        if broken or nowhere or newest < self.saved:
            self.tally.lost_checkpoints += 1
            raise Lost(f"after {kind}: latest is {latest}, saved was step {self.saved}, damaged: {broken}")
        whole = [tag for tag in whole if layout.step_of(tag) <= newest]
        if kind in DAMAGES and len(whole) > 1 and whole[-1] == latest:
            self.damaged.add(damage(self.root / whole.pop(), kind, self.rng))
        self.expected_start = layout.step_of(whole[-1]) if whole else 0
        if not done and reached is not None:
            lost = reached - self.expected_start
            self.tally.lost_steps.append(lost)
            self.tally.useful_s -= lost * self.step_s

    def _compare(self) -> int | None:
        """Compare the steps since the last look with the reference; returns the last one, None if there is none."""
        records = self._records()
        new, self.read = records[self.read :], len(records)
        for record in new:
            if record["kind"] == "resume" and record["step"] != self.expected_start:
                raise Lost(f"the run went on from step {record['step']}, not {self.expected_start}")
            self.tally.refused_saves += record["kind"] == "save_failed"
            if record["kind"] == "save":
                self.tally.saves += 1
                self.saved = record["step"]
            if record["kind"] == "train":
                measured = {name: record.get(name) for name in self.measured}
                if measured != self.reference[record["step"]]:
                    raise Lost(f"step {record['step']}: {measured} instead of {self.reference[record['step']]}")
                self.tally.checked_steps += 1
                self.tally.useful_s += self.step_s
        steps = [record["step"] for record in new if record["kind"] == "train"]
        return steps[-1] if steps else None

    def _end_of(self, log: str, characters: int) -> str:
        return (self.folder / log).read_text(encoding="utf-8", errors="replace")[-characters:]

    def _step(self) -> int:
        return next((r["step"] for r in reversed(self._records()) if r["kind"] in ("train", "resume")), 0)

    def _records(self) -> list[dict[str, Any]]:
        file = self.run_dir / METRICS_FILE
        return read_all(file, []) if file.exists() else []

    def _is_saving(self) -> bool:
        return self.root.exists() and any(".tmp" in name for name in os.listdir(self.root))

    def _save_seconds(self) -> float:
        seconds = [r["seconds"] for r in self._records() if r["kind"] == "save"]
        return seconds[-1] if seconds else 0.2

    def _wait_steps(self, count: int) -> bool:
        """Wait until so many more steps are done; False when a rank has left before."""
        first = self._step()
        return self._wait(lambda: self._step() >= first + count)

    def _wait(self, condition: Callable[[], bool], poll: float = 0.01) -> bool:
        """Wait for the condition; False when a rank has left before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if not self.ranks.alive():
                return False
            if time.monotonic() > deadline:
                raise Lost(f"nothing moves at step {self._step()}:\n{self._end_of('run.log', 3000)}")
            time.sleep(poll)
        return True


def soak(name: str, deaths: int, seed: int, tally: Tally, progress: Callable[[str], None]) -> None:
    """Soak one layout; what happens is counted in ``tally``.

    Raises:
        Lost: with what was lost.
    """
    with tempfile.TemporaryDirectory(prefix="soak-") as place, small_disk(Path(place, "disk")) as mounted:
        faults = dict(FAULTS)
        if not mounted:
            progress("no small disk can be mounted here: 'full disk' is left out")
            del faults["full disk"]
        folder = Path(place)
        run = Soak(folder, write_data(folder), LAYOUTS[name], faults, random.Random(f"{seed}/{name}"), tally)
        run.run(deaths, progress)
