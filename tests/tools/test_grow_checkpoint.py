"""tools/grow_checkpoint.py as a user starts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sgt.checkpoint import layout
from megatron_sgt.config import load_config
from megatron_sgt.stages.operators import OPERATORS
from tests.helpers.checkpoints import write_grown_checkpoint
from tests.helpers.commands import run_here, snapshot
from tests.helpers.deepspeed_files import odd_config, random_state, write_checkpoint

SCRIPT = "tools/grow_checkpoint.py"
OPTIONS = {
    "g_stack": ["--factor", "2"],
    "grad_stack": ["--block-size", "1"],
    "midas": ["--block-size", "2"],
    "lidas": ["--block-size", "2"],
    "msg": ["--hidden-size", "96", "--num-attention-heads", "6", "--num-layers", "5"],
    "compound_grow": ["--factor", "2", "--noise", "0.05"],
    "auto_prog": ["--num-layers", "6"],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_grows_and_says_how_to_go_on(name: str, tmp_path: Path) -> None:
    write_grown_checkpoint(tmp_path / "run", (1, 1, 1))
    before = snapshot(tmp_path / "run")
    arguments = ["--load", "run", "--operator", name, *OPTIONS[name], "--output", "grown"]
    done = run_here(SCRIPT, arguments, tmp_path)
    assert (done.code, done.err) == (0, "")
    assert snapshot(tmp_path / "run") == before and layout.latest_tag(tmp_path / "grown") == "global_step7"
    first, *_, last = done.out.splitlines()
    assert first.startswith(f"{name}: 1") and first.endswith(
        "the function is preserved" if name in ("msg", "compound_grow") else "the function changes"
    )
    assert last == "continue it: torchrun --nproc-per-node N pretrain_sgt.py --config grown/config.yaml"
    assert load_config(tmp_path / "grown/config.yaml").checkpoint.load == "grown"


def test_says_what_becomes_of_everything(tmp_path: Path) -> None:
    write_grown_checkpoint(tmp_path / "run", (1, 1, 1))
    arguments = ["--load", "run", "--operator", "msg", "--num-layers", "6", "--optimizer", "rewind(5)", "--output", "a"]
    done = run_here(SCRIPT, arguments, tmp_path)
    assert "  num_layers 4 -> 6\n  copies of layers 0 1 2 3 0 1\n" in done.out
    assert "  AdamW goes on from step 5, moments scaled\n" in done.out
    assert "  layers [4, 5] are deeper than 1, the shallowest that loops, so that none is ever selected\n" in done.out
    assert layout.read_json(tmp_path / "a/global_step7/sgt_state.json")["layout_free"]["optimizer_step"] == 5
    config = odd_config({"train": {"train_iters": 7, "exit_interval": 7}})
    write_checkpoint(tmp_path / "end", config, random_state(config), (1, 1, 0))
    done = run_here(SCRIPT, ["--load", "end", "--operator", "g_stack", "--output", "b"], tmp_path)
    for name in ("train_iters", "exit_interval"):
        assert f"  the run had reached its last step, 7: set train.{name} to go on\n" in done.out
