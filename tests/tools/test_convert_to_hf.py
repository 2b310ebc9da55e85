"""tools/convert_to_hf.py as a user starts it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_sgt.export.hf.open_model import open_model
from tests.helpers.commands import limit_file_size, run_script, snapshot
from tests.helpers.exports import export_config, write_run

SCRIPT = "tools/convert_to_hf.py"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_run(tmp_path / "ckpt", export_config("grouped_query"), (2, 2, 3))
    return tmp_path / "ckpt"


def demand_the_impossible() -> None:
    """Let no difference of logits be small enough."""
    from megatron_sgt.export import parity

    parity.logit_tolerance = lambda logits: -1.0


def test_converts_compares_and_says_so(root: Path, tmp_path: Path) -> None:
    before = snapshot(root)
    done = run_script(SCRIPT, ["--load", "ckpt", "--output", "hf", "--max-shard-size", "100KB"], tmp_path)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert re.match(r"EXPORT  ckpt/global_step7 -> hf: [1-9]\d* kB of bf16 weights", lines[0]), lines[0]
    assert lines[1] == "MODEL   SGTForCausalLM: it loops in layers 1, 3"
    assert len([line for line in lines if line.startswith("PARITY")]) == 6
    assert lines[-1].startswith("DONE    the same model")
    assert json.loads((tmp_path / "hf" / "parity.json").read_text())["passed"] is True
    assert snapshot(root) == before


def test_the_form_for_serving_works_with_every_tool(root: Path, tmp_path: Path) -> None:
    done = run_script(SCRIPT, ["--load", "ckpt", "--output", "hf", "--dtype", "fp32", "--for", "serving"], tmp_path)
    assert done.code == 0, done.err
    assert done.out.splitlines()[1] == "MODEL   SGTServingForCausalLM: it loops in layers 1, 3"
    assert "DONE    the same model" in done.out
    found = [open_model(tmp_path / folder).model for folder in ("ckpt", "hf")]
    tokens = torch.arange(24).view(2, 12)
    assert type(found[1]).__name__ == "SGTServingForCausalLM" and found[1].config.sgt_num_layers == 4
    with torch.no_grad():
        assert torch.allclose(found[0](tokens).logits, found[1](tokens).logits, atol=1e-5)


def test_a_plain_model_is_plain_in_every_form(tmp_path: Path) -> None:
    write_run(tmp_path / "ckpt", export_config("multi_head", grown=False))
    done = run_script(SCRIPT, ["--load", "ckpt", "--output", "hf", "--for", "serving", "--skip-parity"], tmp_path)
    assert done.out.splitlines()[1] == "MODEL   LlamaForCausalLM: no layer loops; the same for every --for"
    assert not list((tmp_path / "hf").glob("*.py"))


def test_another_model_ends_with_code_1(root: Path, tmp_path: Path) -> None:
    done = run_script(SCRIPT, ["--load", "ckpt", "--output", "hf"], tmp_path, before=demand_the_impossible)
    assert done.code == 1 and "FAILED  the folder is not the same model: hf.failed" in done.out
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt", "hf.failed"}


def test_mistakes_are_told_in_one_line(root: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").write_bytes(b"x")
    mistakes = [
        (["--load", "nowhere", "--output", "hf"], "no checkpoint at nowhere"),
        (["--load", "foreign", "--output", "hf"], "no whole checkpoint at foreign"),
        (["--load", "ckpt", "--step", "9", "--output", "hf"], "no checkpoint of step 9 in ckpt"),
        (["--load", "ckpt", "--output", "there"], "there exists already"),
        (["--load", "ckpt", "--output", "hf", "--tokenizer", "none.model"], "none.model does not exist"),
    ]
    before = snapshot(tmp_path)
    for arguments, words in mistakes:
        done = run_script(SCRIPT, arguments, tmp_path)
        assert (done.code, done.out) == (4, ""), done.err
        assert done.err.startswith("error: ") and words in done.err and done.err.count("\n") == 1, done.err
        assert snapshot(tmp_path) == before
    full = run_script(SCRIPT, ["--load", "ckpt", "--output", "hf"], tmp_path, before=limit_file_size)
    assert full.code == 4 and "hf cannot be written" in full.err and snapshot(tmp_path) == before
    for wrong in (
        ["--max-shard-size", "5XB"],
        ["--skip-parity", "--parity-layers"],
        ["--dtype", "int8"],
        ["--license", "My own"],
    ):
        assert run_script(SCRIPT, ["--load", "ckpt", "--output", "hf", *wrong], tmp_path).code == 2
