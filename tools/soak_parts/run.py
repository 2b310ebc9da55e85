"""One layout: a reference run, then the same run through faults, checked after every death."""

import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.manifest import checksum_problems
from megatron_sgt.config import Config
from megatron_sgt.metrics.records import MEASURED
from soak_parts.aim import Aim, Left
from soak_parts.disk import DAMAGES, damage, small_disk
from soak_parts.faults import FAULTS, drawn
from soak_parts.ranks import RANKS
from soak_parts.running import Lost, Running
from soak_parts.tally import Tally
from soak_parts.workload import INTERVAL, LAYOUTS, SAVES, STEPS, small_config, write_data

_DISK = "disk"


class Soak:
    """A run of one layout, taken through faults of the given kinds until so many deaths have come.

    Args:
        reference: what every step measures (MEASURED) when nothing strikes.
        config: of the run.
    """

    def __init__(
        self,
        config: Config,
        reference: dict[int, dict[str, Any]],
        step_s: float,
        kinds: Iterator[str],
        rng: random.Random,
        tally: Tally,
    ) -> None:
        self.config, self.reference, self.step_s = config, reference, step_s
        self.steps = len(reference)
        self.kinds, self.rng, self.tally = kinds, rng, tally

    def run(self, deaths: int, progress: Callable[[str], None]) -> None:
        """Start the run again and again until so many deaths have come.

        Raises:
            Lost: with what was lost.
        """
        started, tally = time.monotonic(), self.tally
        while tally.deaths.total() < deaths:
            self._start_anew()
            try:
                while tally.deaths.total() < deaths and not self._live_and_die():
                    now = f"{tally.inside} inside a save, at step {self.running.step()}"
                    progress(f"{tally.deaths.total()} deaths, {now}")
                    tally.wall_s = time.monotonic() - started
                self.running.see_to_the_end()
                self._compare()
            finally:
                self.running.leave()

    def _start_anew(self) -> None:
        self.running = Running(self.config, self.step_s)
        self.read = self.expected_start = self.saved = 0
        self.damaged: set[str] = set()

    def _live_and_die(self) -> bool:
        """One start of the run, up to a death or its end. Returns whether the run is done."""
        self.running.start()
        kind, left = "no fault", Left.ALIVE
        try:
            while left is Left.ALIVE:
                kind, aim, steps = next(self.kinds), self._aim(), self.rng.randint(1, 2 * INTERVAL)
                left = Left.GONE
                if self.running.wait_steps(steps):
                    left = FAULTS[kind].strike(self.running, aim)
                    self.tally.faults[kind] += left is not Left.GONE
        finally:
            codes = self.running.end()
        done = codes == [0] * RANKS
        if left is Left.GONE and not done:
            raise Lost(f"the run ended by itself with {codes}:\n{self.running.said()}")
        if done and self.running.step() != self.steps:
            raise Lost(f"the run says that it is done at step {self.running.step()} of {self.steps}")
        self._check(kind, done)
        return done

    def _aim(self) -> Aim:
        return Aim(self.rng.randrange(RANKS), self.rng.random(), self.rng)

    def _check(self, kind: str, done: bool) -> None:
        """After a death, or the end: what counts as a checkpoint is whole, and every step is the reference's."""
        reached = self._compare()
        root = self.running.root
        finished = layout.finished_tags(root)
        if not done:
            self.tally.deaths[kind] += 1
            self.tally.inside += any(p.is_dir() and p.name not in finished for p in root.glob("global_step*"))
        self.damaged = {t for t in self.damaged if t not in finished or checksum_problems(root / t)}
        whole = [tag for tag in finished if tag not in self.damaged]
        tracker = root / layout.LATEST_FILE
        # Until the first pointer is there, the newest committed one counts (layout.latest_tag).
        latest = tracker.read_text(encoding="utf-8").strip() if tracker.exists() else next(iter(finished[::-1]), "")
        newest = layout.step_of(latest)
        broken = [problem for tag in whole for problem in checksum_problems(root / tag)]
        nowhere = latest and latest not in finished and latest not in self.damaged
        if broken or nowhere or newest < self.saved:
            self.tally.lost_checkpoints += 1
            raise Lost(f"after {kind}: latest is {latest}, saved was step {self.saved}, damaged: {broken}")
        whole = [tag for tag in whole if layout.step_of(tag) <= newest]
        if kind in DAMAGES and len(whole) > 1 and whole[-1] == latest:
            self.damaged.add(damage(root / whole.pop(), kind, self.rng))
        self.expected_start = layout.step_of(whole[-1]) if whole else 0
        if not done and reached is not None:
            lost = reached - self.expected_start
            self.tally.lost_steps.append(lost)
            self.tally.useful_s -= lost * self.step_s

    def _compare(self) -> int | None:
        """Compare the steps since the last look with the reference; returns the last one, None if there is none."""
        records = self.running.records()
        new, self.read = records[self.read :], len(records)
        starts = [record["step"] for record in new if record["kind"] == "resume"]
        if starts not in ([], [self.expected_start]):
            raise Lost(f"the run went on from step {starts}, not once from {self.expected_start}")
        for record in new:
            self.tally.refused_saves += record["kind"] == "save_failed"
            if record["kind"] == "save":
                self.tally.saves += 1
                self.saved = record["step"]
            if record["kind"] == "train":
                measured = {name: record.get(name) for name in MEASURED}
                if measured != self.reference[record["step"]]:
                    raise Lost(f"step {record['step']}: {measured} instead of {self.reference[record['step']]}")
                self.tally.checked_steps += 1
                self.tally.useful_s += self.step_s
        steps = [record["step"] for record in new if record["kind"] == "train"]
        return steps[-1] if steps else None


def reference_of(config: Config) -> tuple[dict[int, dict[str, Any]], float]:
    """What every step of an undisturbed run measures, and the seconds that a step takes.

    Raises:
        Lost: it does not come to its end.
    """
    running = Running(config, 0.0)
    running.start()
    codes = running.ranks.end(600)
    records = [record for record in running.records() if record["kind"] == "train"]
    if any(codes) or [record["step"] for record in records] != list(range(1, config.train.train_iters + 1)):
        raise Lost(f"the reference run ended with {codes}: {running.said()}")
    seconds = sorted(b["time"] - a["time"] for a, b in pairwise(records))
    return {r["step"]: {name: r.get(name) for name in MEASURED} for r in records}, seconds[len(seconds) // 2]


Progress = Callable[[str, str], None]


def soak(
    name: str,
    deaths: int,
    seed: int,
    tallies: dict[str, Tally],
    progress: Progress,
    kinds: Sequence[str] = (),
    steps: int = STEPS,
) -> None:
    """Soak one layout with each kind of saves that ``tallies`` counts, so many deaths each.

    Args:
        progress: is given the kind of saves and a line.
        kinds: the faults that come first, in this order; then random ones.
        steps: of the run.

    Raises:
        Lost: with what was lost, and where the files are kept.
    """
    with tempfile.TemporaryDirectory(prefix="soak-") as place, small_disk(Path(place, _DISK)) as mounted:
        faults = dict(FAULTS)
        if not mounted:
            progress("", "no small disk can be mounted here: 'full disk' is left out")
            del faults["full disk"]
        folder = Path(place)
        data = write_data(folder)
        reference, step_s = reference_of(small_config(folder / "reference", data, LAYOUTS[name], {}, steps))
        for saves, tally in tallies.items():
            rng = random.Random(f"{seed}/{name}/{saves}")
            checkpoint = {
                "save": str(folder / _DISK / saves),
                "save_interval": INTERVAL,
                "keep_last": 3,
                "keep_every": 0,
            }
            config = small_config(folder / saves, data, LAYOUTS[name], checkpoint | SAVES[saves], steps)
            run = Soak(config, reference, step_s, chain(kinds, drawn(faults, rng)), rng, tally)
            try:
                run.run(deaths, partial(progress, saves))
            except Lost as error:
                kept = shutil.copytree(folder, tempfile.mkdtemp(prefix=f"lost-{name}-{saves}-"), dirs_exist_ok=True)
                raise Lost(f"{error}\nall files are in {kept}") from error
            shutil.rmtree(run.running.root)
