"""Tools on checkpoints and records that were edited by hand: one line, the documented exit code, no traceback."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_sgt.checkpoint import layout
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth.replay import read_events
from megatron_sgt.reporting.run_data import load_run
from tests.helpers.checkpoints import grown_config
from tests.helpers.commands import run_here
from tests.helpers.edges import refused
from tests.helpers.forging import (
    DEEP,
    EDITS,
    LATEST,
    NEWER,
    Edit,
    as_folder,
    cut,
    replaced,
    signed_again,
    write_pair,
)  # fmt: skip

STATE, CONFIG, MANIFEST = layout.STATE_FILE, layout.CONFIG_FILE, layout.MANIFEST_FILE


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forged") / "checkpoints"
    write_pair(root)
    return root


TOOLS = {
    "tools/reshard_checkpoint.py": ["--load", "CKPT", "--output", "OUT"],
    "tools/convert_to_hf.py": ["--load", "CKPT", "--output", "OUT", "--skip-parity"],
    "tools/evaluate.py": ["CKPT", "--device", "cpu"],
    "tools/generate.py": ["CKPT", "--device", "cpu", "--prompt", "a"],
}
TOOL_EDITS: list[tuple[str, Edit]] = [
    *((name, edit) for name in (MANIFEST, STATE, CONFIG) for edit in (cut, EDITS["deep"], EDITS["tagged"], as_folder)),
    (STATE, replaced(b"[]")),
    (STATE, replaced(b'{"trainer": null, "hooks": [], "layout": 3}')),
    ("latest", LATEST["not UTF-8"]),
    ("latest", LATEST["elsewhere"]),
]


def damage(root: Path, name: str, edit: Edit) -> None:
    """Edit ``latest``, or a file of the newer checkpoint, whose manifest is made to fit it."""
    edit(root / name if name == "latest" else root / NEWER / name)
    if name in (STATE, CONFIG) and (root / NEWER / name).is_file():
        signed_again(root / NEWER, name)


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_refuse_in_one_line(tool: str, template: Path, tmp_path: Path) -> None:
    every = 1 if tool == "tools/reshard_checkpoint.py" else 5  # the others read a checkpoint alike
    for number, (name, edit) in enumerate(TOOL_EDITS[::every]):
        root = tmp_path / str(number)
        shutil.copytree(template, root)
        damage(root, name, edit)
        given = {"CKPT": str(root), "OUT": str(tmp_path / f"out{number}")}
        refused(run_here(tool, [given.get(word, word) for word in TOOLS[tool]], tmp_path), 4, "latest|global_step9")
        assert not (tmp_path / f"out{number}" / NEWER).exists()


def test_what_inspect_and_report_say(template: Path, tmp_path: Path) -> None:
    for number, (name, edit) in enumerate(TOOL_EDITS):
        root = tmp_path / str(number)
        shutil.copytree(template, root)
        damage(root, name, edit)
        found = run_here("tools/inspect_checkpoint.py", [str(root)], tmp_path)
        assert found.code == 4 and "Traceback" not in found.err + found.out, (name, found)
        assert "damaged" in found.out or "latest" in found.out


def test_what_a_report_says_of_damaged_files(tmp_path: Path) -> None:
    lines = ['{"kind":"train","step":1}', '{"kind":"resume","step":"x"}', DEEP, '{"kind":"train","step":null}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for edit in ("deep", "tagged", "a tag's wrong text", "ten thousand digits", "folder", "not UTF-8"):
        path = tmp_path / "config.yaml"
        path.write_text("model: {}\n")
        EDITS[edit](path)
        notes = load_run(tmp_path).notes
        assert any("config.yaml cannot be read" in note for note in notes), (edit, notes)
        assert any("1 line(s) of metrics.jsonl cannot be read" in note for note in notes)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(run_here("tools/summarize_run.py", [str(tmp_path)], tmp_path), 3, "line 3 is no metrics record")


RECORDS = [
    DEEP, "[" + DEEP + "]", "9" * 10_000, '[{"kind": "growth", "step": null}]', '[{"kind": "growth"}]', "[]", "{}",
    "\xff",
    '[{"kind": "growth", "action": "first_selection", "step": 1e400, "layer": 1, "kept_heads": {"1": [0]}}]',
    '[{"kind": "growth", "action": "first_selection", "step": 2, "layer": 1, "kept_heads": [0]}]',
    '[{"kind": "growth", "action": "first_selection", "step": 2, "layer": 1, "kept_heads": {"1": [0, 9]}}]',
    '[{"kind": "growth", "action": "first_selection", "step": 2, "layer": 9, "kept_heads": {"9": [0]}}]',
    '[{"kind": "growth", "action": ["fixed"], "step": 2}]', '[{"kind": "resume", "step": "x"}, 3]',
]  # fmt: skip


def test_damaged_records_of_growth_are_refused(tmp_path: Path) -> None:
    model = grown_config().model
    for text in RECORDS:
        path = tmp_path / f"{hash(text)}.json"
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=r"^growth\.replay: ") as caught:
            read_events(path, grown_config().growth, model.num_layers, model.num_attention_heads)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500, text[:60]
