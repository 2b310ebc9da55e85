"""The short form of the soak, and proof that a loss would be seen."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import pytest
from soak_parts.run import Soak, soak
from soak_parts.running import Lost
from soak_parts.tally import Tally
from soak_parts.workload import LAYOUTS, SAVES, small_config

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.manifest import write_manifest
from megatron_sgt.jsonl import JsonlWriter
from megatron_sgt.metrics import METRICS_FILE
from megatron_sgt.metrics.records import MEASURED
from tests.helpers.exhaustive import share_of
from tests.helpers.ranks import start_server

EVERY = list(product(LAYOUTS, SAVES))
SHORT = {
    ("tp2-zero1", "sync"): ["killed before the manifest", "killed holder", "flipped bit", "SIGTERM to one rank"],
    ("dp2-zero3", "async"): [
        "second start",
        "stopped holder",
        "killed between the files of a save",
        "killed after the manifest",
    ],
}
ALL = [kind for kinds in SHORT.values() for kind in kinds]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "saves"), share_of(EVERY, [("tp2-zero1", "sync")]))
def test_deaths_lose_nothing(name: str, saves: str) -> None:
    """Half of the faults on one cell; `make test-all`: the others on another, all of them on the rest.

    `python tools/soak.py` is the long form.
    """
    start_server()
    tally, kinds = Tally(), SHORT.get((name, saves), ALL)
    deaths = [kind for kind in kinds if kind != "second start"]
    soak(name, len(deaths), 7, {saves: tally}, print, kinds, steps=15 * len(kinds))
    assert tally.deaths == dict.fromkeys(deaths, 1) and tally.faults == dict.fromkeys(kinds, 1)
    assert tally.lost_checkpoints == 0 and tally.checked_steps > 0 and tally.saves > 0


def measured(step: int) -> dict[str, float]:
    return dict.fromkeys(MEASURED, float(step))


@pytest.fixture
def after_death(tmp_path: Path) -> Soak:
    """A run that has died after step 5, with checkpoints of steps 2 and 4."""
    config = small_config(tmp_path / "run", "data", LAYOUTS["dp2-zero1"], {})
    run = Soak(config, {step: measured(step) for step in range(1, 9)}, 0.1, iter(()), random.Random(1), Tally())
    run._start_anew()
    root, metrics = run.running.root, run.running.run_dir / METRICS_FILE
    metrics.parent.mkdir()
    writer = JsonlWriter(metrics)
    writer.write("resume", {"step": 0})
    for step in range(1, 6):
        writer.write("train", {"step": step, **measured(step)})
        if step in (2, 4):
            folder = root / layout.tag_for(step)
            folder.mkdir(parents=True)
            (folder / "weights.pt").write_bytes(b"1234")
            write_manifest(folder, {"tag": folder.name})
            layout.point_to(root, folder.name)
            writer.write("save", {"step": step, "seconds": 0.1})
    return run


def test_a_sound_death_is_counted(after_death: Soak) -> None:
    (after_death.running.root / "global_step6.tmp").mkdir()
    after_death._check("kill one rank", done=False)
    tally = after_death.tally
    assert (tally.deaths.total(), tally.inside, tally.lost_steps, tally.saves) == (1, 1, [1], 2)
    assert after_death.expected_start == 4


def test_before_the_first_pointer_is_written_the_committed_one_counts(after_death: Soak) -> None:
    (after_death.running.root / layout.LATEST_FILE).unlink()
    after_death._check("killed before latest is written", done=False)
    assert after_death.expected_start == 4


def test_after_our_own_damage_the_one_before_counts(after_death: Soak) -> None:
    after_death._check("deleted file", done=False)
    assert after_death.damaged == {"global_step4"} and after_death.expected_start == 2
    after_death._check("kill one rank", done=False)
    assert after_death.expected_start == 2


@pytest.mark.parametrize("loss", ["bytes", "pointer", "nowhere", "resume", "second start", "step"])
def test_a_loss_is_seen(after_death: Soak, loss: str) -> None:
    root = after_death.running.root
    if loss == "bytes":
        (root / "global_step4" / "weights.pt").write_bytes(b"1235")
    elif loss == "pointer":
        layout.point_to(root, "global_step2")
    elif loss == "nowhere":
        layout.point_to(root, "global_step6")
    elif loss == "resume":
        after_death.expected_start = 2
    elif loss == "second start":
        JsonlWriter(after_death.running.run_dir / METRICS_FILE).write("resume", {"step": 0})
    else:
        after_death.reference[5]["loss"] = 5.0000001
    with pytest.raises(Lost):
        after_death._check("kill one rank", done=False)
