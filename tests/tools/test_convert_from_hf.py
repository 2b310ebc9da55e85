"""tools/convert_from_hf.py as a user starts it: in, on with the run's file, out again, every bit the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sgt.config import load_config
from megatron_sgt.export.to_hf import ExportOptions, export_checkpoint
from tests.helpers import grown_run
from tests.helpers.commands import run_here
from tests.helpers.hf_folders import FAMILIES, save_hf_model

SCRIPT = "tools/convert_from_hf.py"
DTYPES = {"mistral": ("bf16", torch.bfloat16), "qwen2": ("fp16", torch.float16)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_in_and_out_again_is_the_same_model(name: str, tmp_path: Path) -> None:
    word, dtype = DTYPES.get(name, ("fp32", torch.float32))
    save_hf_model(tmp_path / "hf", name, dtype, shard_size="20KB")
    done = run_here(SCRIPT, ["--input", "hf", "--output", "in"], tmp_path)
    assert (done.code, done.err) == (0, "")
    assert f"({str(dtype).removeprefix('torch.')})" in done.out and "pretrain_sgt.py --config in/run.yaml" in done.out
    export_checkpoint(tmp_path / "in", tmp_path / "out", options=ExportOptions(dtype=word))
    before, after = weights(tmp_path / "hf"), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)


def test_a_grown_model_comes_back(tmp_path: Path) -> None:
    shutil.copytree(grown_run.export(), tmp_path / "hf")
    done = run_here(SCRIPT, ["--input", "hf", "--output", "in"], tmp_path)
    assert done.code == 0, done.err
    config = load_config(tmp_path / "in" / "run.yaml")
    assert config.data.tokenizer is not None and config.data.tokenizer.type == "sentencepiece"
    export_checkpoint(tmp_path / "in", tmp_path / "out", options=ExportOptions(dtype="fp32", write_tokenizer=False))
    before, after = weights(tmp_path / "hf"), weights(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert (tmp_path / "hf" / "config.json").read_text().partition("sgt_loops")[2] == (
        (tmp_path / "out" / "config.json").read_text().partition("sgt_loops")[2]
    )


@pytest.mark.parametrize("name", ["llama_3.1", "qwen2_yarn"])
def test_scaled_positions_are_not_warned_of(name: str, tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", name)
    done = run_here(SCRIPT, ["--input", "hf", "--output", "in", "--seq-length", "16"], tmp_path)
    assert (done.code, done.err) == (0, "") and "see" not in done.out
    done = run_here("tools/convert_to_hf.py", ["--load", "in", "--output", "out", "--dtype", "fp32"], tmp_path)
    assert (done.code, done.err) == (0, "") and "rotary positions up to 128" in done.out


def test_a_sliding_window_is_said(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "mistral", sliding_window=40)
    done = run_here(SCRIPT, ["--input", "hf", "--output", "in"], tmp_path)
    assert done.code == 0 and "see 40 tokens back" in done.out and "model.seq_length is 40" in done.out
    done = run_here(SCRIPT, ["--input", "hf", "--output", "no", "--seq-length", "41"], tmp_path)
    assert done.code == 2 and "41 tokens are more than sliding_window 40" in done.err


def test_a_run_of_ones_own(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "llama")
    assert run_here(SCRIPT, ["--input", "hf", "--output", "first", "--seq-length", "32"], tmp_path).code == 0
    assert run_here(SCRIPT, ["--input", "hf", "--output", "no", "--base-model", "a/b/c"], tmp_path).code == 2
    text = (tmp_path / "first" / "run.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("lr: 0.0001", "lr: 0.0002"))
    done = run_here(SCRIPT, ["--input", "hf", "--output", "second", "--config", "mine.yaml"], tmp_path)
    assert done.code == 0 and "--config mine.yaml checkpoint.load=second" in done.out
    assert not (tmp_path / "second" / "run.yaml").exists()
    assert load_config(tmp_path / "second" / "global_step0" / "config.yaml").optim.lr == 2e-4
