"""A file asks a run to save and go on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.errors import LeaseError
from megatron_sgt.guard.save_now import FILE, SaveTrigger, ask_to_save
from megatron_sgt.lease import Lease, held, inside


def test_a_request_is_there_until_it_is_taken(tmp_path: Path) -> None:
    trigger = SaveTrigger(tmp_path)
    assert not trigger.asked()
    trigger.take()
    for _ in range(2):
        (tmp_path / FILE).touch()
        assert trigger.asked() and trigger.asked()
        trigger.take()
        assert not trigger.asked() and not (tmp_path / FILE).exists()


def test_what_cannot_be_deleted_asks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the run would save after every step."""

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "unlink", refuse)
    (tmp_path / FILE).touch()
    trigger = SaveTrigger(tmp_path)
    assert trigger.asked()
    trigger.take()
    assert not trigger.asked()
    os.utime(tmp_path / FILE, ns=(1, 1))
    assert trigger.asked(), "touched again"


def test_the_run_that_holds_the_folder_is_asked(tmp_path: Path) -> None:
    with pytest.raises(LeaseError, match=rf"no run writes into {tmp_path}, so none can save"):
        ask_to_save(tmp_path)
    assert not (tmp_path / FILE).exists(), "no later run finds a request that was refused"
    lines: list[Any] = []
    with held(Lease(inside(tmp_path), "a run", "wait", tmp_path, say=lines.append)):
        said = ask_to_save(tmp_path)
    assert str(tmp_path / FILE) in said and f"pid {os.getpid()}" in said and SaveTrigger(tmp_path).asked()
