"""Parity layer by layer: passes and fails as that of the whole models does."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sgt.export.forms import SERVING, STANDARD, Form
from megatron_sgt.export.parity import check_parity
from megatron_sgt.export.parity_layers import check_parity_by_layers
from megatron_sgt.export.to_hf import ExportOptions, export_checkpoint
from tests.export.test_parity import one_weight, other_heads, wrong_with_a_cache
from tests.helpers.exports import export_config, write_run


@pytest.mark.parametrize(
    ("variant", "grown", "form"),
    [("qk_norm", True, STANDARD), ("tied_wide_padded", True, STANDARD), ("layer_norm_gelu", True, STANDARD),
     ("qkv_bias", False, STANDARD), ("qk_norm", False, STANDARD), ("layer_norm_gelu", True, SERVING)],
)  # fmt: skip
def test_agrees_with_the_whole_models(tmp_path: Path, variant: str, grown: bool, form: Form) -> None:
    write_run(tmp_path / "ckpt", export_config(variant, grown))
    options = ExportOptions(dtype="fp32", form=form, max_shard_bytes=50_000)
    export = export_checkpoint(tmp_path / "ckpt", tmp_path / "out", options=options)
    parity = check_parity_by_layers(export)
    assert parity.passed, [check.line() for check in parity.checks]
    whole = check_parity(export, new_tokens=2)
    assert abs(parity.checks[0].value - whole.checks[0].value) < 2e-5 and parity.mode == "layers"


@pytest.mark.parametrize("damage", [other_heads, one_weight, wrong_with_a_cache])
def test_another_model_is_caught(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    write_run(tmp_path / "ckpt", export_config("multi_head"))
    export = export_checkpoint(tmp_path / "ckpt", tmp_path / "out", options=ExportOptions(dtype="fp32"))
    damage(export.folder)
    assert not check_parity_by_layers(export).passed
