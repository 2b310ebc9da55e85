"""Which checkpoint is found is agreed on by all ranks; tests/integration/test_resume.py has whole runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sgt.engine import start as module
from megatron_sgt.engine.start import find_together, own_look, place_together
from megatron_sgt.errors import CheckpointError
from megatron_sgt.preflight import Start
from megatron_sgt.stages.stages import stages_of
from tests.helpers.fake_groups import fake_groups
from tests.helpers.single import small_config


def test_damaged_checkpoints_are_passed_over_unless_the_user_named_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, bad = Path("global_step4"), Path("global_step8")
    monkeypatch.setattr(module, "verify_together", lambda folder, *_: "a flipped bit" if folder == bad else None)
    session: Any = SimpleNamespace(config=small_config(), groups=fake_groups())
    seen: list[dict[Path, str]] = []

    def look(damaged: dict[Path, str]) -> Start:
        seen.append(dict(damaged))
        return Start(whole if bad in damaged else bad, {})

    assert find_together(look, session).folder == whole
    assert seen == [{}, {bad: "a flipped bit"}]
    with pytest.raises(CheckpointError, match="a flipped bit"):
        find_together(lambda damaged: Start(bad, {}, explicit=True), session)
    assert find_together(lambda damaged: Start(None, {}), session).folder is None


def test_a_run_that_goes_back_looks_among_its_own(tmp_path: Path) -> None:
    checkpoint = {"load": "/elsewhere", "resume": "never", "save": str(tmp_path)}
    session: Any = SimpleNamespace(config=small_config(checkpoint=checkpoint))
    assert own_look(session)({}) == Start(None, {})


def test_a_fresh_start_is_in_the_first_stage() -> None:
    stage = {"until_steps": 4, "operator": "g_stack"}
    config = small_config(growth={"method": "vanilla", "stages": [stage]})
    stages = stages_of(config)
    place = place_together(Start(None, {}), config, stages)
    assert place.there is place.here is stages[0]
