"""Parity passes for every kind of model, and fails for folders that are another one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sgt.export.forms import SERVING
from megatron_sgt.export.parity import PARITY_FILE, Check, Parity, check_parity, logit_tolerance
from megatron_sgt.export.to_hf import Export, ExportOptions, export_checkpoint
from tests.helpers.exports import VARIANTS, change_config, export_config, write_run

FP32 = ExportOptions(dtype="fp32")
PLAIN = {
    "multi_head": "Llama",
    "biases": "Llama",
    "qkv_bias": "Qwen2",
    "qk_norm": "Qwen3",
    "tied_wide_padded": "Llama",
}


def exported(tmp_path: Path, variant: str, grown: bool = True, options: ExportOptions = FP32, depth: int = 2) -> Export:
    write_run(tmp_path / "ckpt", export_config(variant, grown, depth), depth=depth)
    return export_checkpoint(tmp_path / "ckpt", tmp_path / "out", options=options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_grown_models_are_the_same_outside(tmp_path: Path, variant: str) -> None:
    export = exported(tmp_path, variant, depth=3 if variant == "qk_norm" else 2)
    assert export.architecture == "SGTForCausalLM"
    parity = check_parity(export)
    assert parity.passed, [check.line() for check in parity.checks]
    assert {check.name: check.tolerance for check in parity.checks} == {
        "logits, largest difference": 1e-4,
        "loss, difference": 1e-5,
        "logits, cached against uncached": 1e-4,
        "greedy continuation, differing tokens": 0.0,
    }
    assert max(check.value for check in parity.checks) < 3e-5


@pytest.mark.parametrize(("variant", "family"), PLAIN.items())
def test_models_that_never_grew_are_plain_ones(tmp_path: Path, variant: str, family: str) -> None:
    export = exported(tmp_path, variant, grown=False)
    assert export.architecture == f"{family}ForCausalLM"
    assert not list(export.folder.glob("*.py"))
    parity = check_parity(export, new_tokens=16)
    assert parity.passed, [check.line() for check in parity.checks]


@pytest.mark.parametrize(
    "options",
    [ExportOptions(), ExportOptions(dtype="fp16"), ExportOptions(dtype="fp32", training_gates=True),
     ExportOptions(dtype="fp32", keep_padding=True), ExportOptions(form=SERVING),
     ExportOptions(dtype="fp32", training_gates=True, form=SERVING)],
    ids=["bf16", "fp16", "training gates", "padding", "serving", "serving with training gates"],
)  # fmt: skip
def test_with_other_options(tmp_path: Path, options: ExportOptions) -> None:
    parity = check_parity(exported(tmp_path, "tied_wide_padded", options=options), new_tokens=16)
    assert parity.passed, [check.line() for check in parity.checks]
    assert len(parity.checks) == (4 if options.dtype == "fp32" else 6)


def other_heads(folder: Path) -> None:
    change_config(folder, sgt_loops={"1": {"heads": [1, 2], "depth": 1}, "3": {"heads": [0, 2], "depth": 2}})


def other_depth(folder: Path) -> None:
    change_config(folder, sgt_loops={"1": {"heads": [1, 2], "depth": 1}, "3": {"heads": [0, 3], "depth": 1}})


def other_theta(folder: Path) -> None:
    change_config(folder, rope_theta=10050.0)


def other_epsilon(folder: Path) -> None:
    change_config(folder, rms_norm_eps=1e-4)


def one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][5, 7] += 0.05
    save_file(weights, folder / "model.safetensors")


def one_not_a_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][5] = torch.nan
    save_file(weights, folder / "model.safetensors")


def wrong_with_a_cache(folder: Path) -> None:
    """Code that caches the keys of another sequence of the batch: right without a cache."""
    code = folder / "attention_sgt.py"
    text = code.read_text()
    assert text.count("self.cache.update(key, value,") == 1
    code.write_text(text.replace("self.cache.update(key, value,", "self.cache.update(key.flip(0), value,"))
    # Within a process transformers takes the code that it loaded first for a configuration class.
    with (folder / "configuration_sgt.py").open("a") as stream:
        stream.write("# another\n")


@pytest.mark.parametrize(
    ("damage", "caught"),
    [(other_heads, "logits, largest"), (other_depth, "logits, largest"), (other_theta, "logits, largest"),
     (other_epsilon, "logits, largest"), (one_weight, "logits, largest"), (one_not_a_number, "loss"),
     (wrong_with_a_cache, "cached against uncached")],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_another_model_is_caught(tmp_path: Path, damage: Callable[[Path], None], caught: str) -> None:
    export = exported(tmp_path, "multi_head")
    damage(export.folder)
    failed = [check.name for check in check_parity(export).checks if not check.passed]
    assert any(caught in name for name in failed), failed


def test_the_report_is_written(tmp_path: Path) -> None:
    export = exported(tmp_path, "multi_head")
    parity = Parity("full", (Check("a", 1e-6, 1e-5), Check("b", float("nan"), 1.0)), "nothing")
    assert not parity.passed and parity.checks[1].line() == "b: nan (tolerance 1e+00)  FAILED"
    parity.write(export.folder, export)
    report = json.loads((export.folder / PARITY_FILE).read_text())
    assert (report["passed"], report["step"], report["dtype"]) == (False, 7, "fp32")
    assert [check["passed"] for check in report["checks"]] == [True, False]


def test_tolerance_grows_with_large_logits_only() -> None:
    assert logit_tolerance(torch.tensor([30.0, -3.0])) == 1e-4
    assert logit_tolerance(torch.tensor([-100.0])) == pytest.approx(3e-4)
