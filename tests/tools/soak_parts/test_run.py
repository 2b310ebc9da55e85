"""The short form of the soak, and proof that a loss would be seen."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from soak_parts.run import Lost, Soak, soak
from soak_parts.tally import Tally
from soak_parts.workload import LAYOUTS

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.manifest import write_manifest
from megatron_sgt.jsonl import JsonlWriter
from megatron_sgt.metrics import METRICS_FILE
from tests.helpers.exhaustive import share_of
from tests.helpers.ranks import start_server


@pytest.mark.slow
@pytest.mark.parametrize("name", share_of(LAYOUTS, ["tp2-zero1", "dp2-zero3"]))
def test_twenty_deaths_lose_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Five on each layout; `make test` takes one of each kind and stage. `python tools/soak.py` is the long form."""
    start_server()
    tally = Tally()
    soak(name, 5, 7, tally, print)
    assert tally.deaths.total() == 5 and tally.lost_checkpoints == 0
    assert tally.checked_steps > 0 and tally.saves > 0


@pytest.fixture
def after_death(tmp_path: Path) -> Soak:
    """A run that has died after step 5, with checkpoints of steps 2 and 4."""
    run = Soak.__new__(Soak)
    run.rng, run.tally = random.Random(1), Tally()
    run.run_dir, run.root = tmp_path, tmp_path / "checkpoints"
    run.read = run.expected_start = run.saved = 0
    run.damaged, run.step_s = set(), 0.1
    run.reference = {step: dict.fromkeys(("loss",), float(step)) for step in range(1, 9)}
    run.measured = ("loss",)
    writer = JsonlWriter(tmp_path / METRICS_FILE)
    writer.write("resume", {"step": 0})
    for step in range(1, 6):
        writer.write("train", {"step": step, "loss": float(step)})
        if step in (2, 4):
            folder = run.root / layout.tag_for(step)
            folder.mkdir(parents=True)
            (folder / "weights.pt").write_bytes(b"1234")
            write_manifest(folder, {"tag": folder.name})
            layout.point_to(run.root, folder.name)
            writer.write("save", {"step": step, "seconds": 0.1})
    return run


def test_a_sound_death_is_counted(after_death: Soak) -> None:
    (after_death.root / "global_step6.tmp").mkdir()
    after_death._check("kill one rank", done=False)
    tally = after_death.tally
    assert (tally.deaths.total(), tally.inside, tally.lost_steps, tally.saves) == (1, 1, [1], 2)
    assert after_death.expected_start == 4


def test_after_our_own_damage_the_one_before_counts(after_death: Soak) -> None:
    after_death._check("deleted file", done=False)
    assert after_death.damaged == {"global_step4"} and after_death.expected_start == 2
    after_death._check("kill one rank", done=False)
    assert after_death.expected_start == 2


@pytest.mark.parametrize("loss", ["bytes", "pointer", "nowhere", "resume", "step"])
def test_a_loss_is_seen(after_death: Soak, loss: str) -> None:
    if loss == "bytes":
        (after_death.root / "global_step4" / "weights.pt").write_bytes(b"1235")
    elif loss == "pointer":
        layout.point_to(after_death.root, "global_step2")
    elif loss == "nowhere":
        layout.point_to(after_death.root, "global_step6")
    elif loss == "resume":
        after_death.expected_start = 2
    else:
        after_death.reference[5]["loss"] = 5.0000001
    with pytest.raises(Lost):
        after_death._check("kill one rank", done=False)
