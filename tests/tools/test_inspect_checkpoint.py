"""tools/inspect_checkpoint.py as a user starts it."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_sgt.checkpoint import layout
from tests.helpers.checkpoints import write_grown_checkpoint
from tests.helpers.commands import run_script, snapshot

SCRIPT = "tools/inspect_checkpoint.py"


def test_shows_a_run_and_one_checkpoint(tmp_path: Path) -> None:
    folder = write_grown_checkpoint(tmp_path / "run")
    before = snapshot(tmp_path)
    done = run_script(SCRIPT, ["run"], tmp_path)
    assert (done.code, done.err) == (0, "") and "<- latest" in done.out
    as_json = run_script(SCRIPT, [f"run/{folder.name}", "--json"], tmp_path)
    values = json.loads(as_json.out)
    assert as_json.code == 0 and values["details"]["growth"]["layers"][0]["kept_heads"] == [0, 3]
    assert snapshot(tmp_path) == before


def test_damage_is_exit_code_4(tmp_path: Path) -> None:
    folder = write_grown_checkpoint(tmp_path / "run")
    (folder / layout.rng_file(1)).unlink()
    for path in ("run", f"run/{folder.name}"):
        done = run_script(SCRIPT, [path], tmp_path)
        assert done.code == 4 and "! rng_rank_00001.pt is missing" in done.out and done.err == ""
    nowhere = run_script(SCRIPT, ["nowhere"], tmp_path)
    assert nowhere.code == 4 and nowhere.err.startswith("error: no checkpoint at nowhere")
    (folder / layout.MANIFEST_FILE).unlink()
    unfinished = run_script(SCRIPT, [f"run/{folder.name}"], tmp_path)
    assert unfinished.code == 4 and "unfinished" in unfinished.out and "selected at step 2" in unfinished.out
    assert run_script(SCRIPT, ["run"], tmp_path).code == 4


def test_a_changed_byte_needs_the_checksums(tmp_path: Path) -> None:
    folder = write_grown_checkpoint(tmp_path / "run")
    file = next(folder.glob("*model_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    assert run_script(SCRIPT, ["run"], tmp_path).code == 0
    done = run_script(SCRIPT, ["run", "--checksums"], tmp_path)
    assert done.code == 4 and f"! {file.name} has changed since it was saved" in done.out
