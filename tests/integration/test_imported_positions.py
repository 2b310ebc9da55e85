"""Models with scaled positions or sliding windows, imported and exported again: the same function, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sgt.checkpoint.reshard.layout_free import file_name
from megatron_sgt.errors import ConfigError
from megatron_sgt.export.checked import checked_export
from megatron_sgt.export.forms import SERVING
from megatron_sgt.export.from_hf import import_model
from megatron_sgt.export.hf.loading import load_exported
from megatron_sgt.export.parity import Parity
from megatron_sgt.export.parity_layers import check_parity_by_layers
from megatron_sgt.export.to_hf import ExportOptions, export_checkpoint
from tests.helpers.exports import write_run
from tests.helpers.hf_folders import SCALED, VOCAB_SIZE, save_hf_model
from tests.helpers.single import small_config

FP32 = ExportOptions(dtype="fp32")
TOKENS = torch.randint(VOCAB_SIZE, (2, 64), generator=torch.Generator().manual_seed(0))


def again(folder: Path, root: Path, **options: Any) -> tuple[Any, Parity | None]:
    """What an export of the import of ``folder`` is, and its parity."""
    import_model(folder, root, **options)
    export, parity = checked_export(root, root / "out", options=FP32)
    return load_exported(export.folder, torch.float32, export.architecture.startswith("SGT")), parity


@torch.no_grad()
def logits(model: Any, length: int = 64) -> torch.Tensor:
    return model(TOKENS[:, :length]).logits


@pytest.mark.parametrize("name", SCALED)
def test_scaled_positions_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    """At four times the context before the scaling. The project's own logits are those of the export by parity."""
    original = save_hf_model(tmp_path / "hf", name)
    model, parity = again(tmp_path / "hf", tmp_path / "root", seq_length=64)
    assert parity is not None and parity.passed and any("rotary positions" in check.name for check in parity.checks)
    assert torch.equal(logits(model), logits(original))
    weights = original.state_dict()
    found = model.state_dict()
    assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)
    for setting in ("rope_parameters", "max_position_embeddings", "architectures"):
        assert getattr(model.config, setting) == getattr(original.config, setting), setting


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_a_grown_model_has_them_in_its_loops_too(kind: str, tmp_path: Path) -> None:
    scaling: dict[str, Any] = {"type": kind, "factor": 4.0, "original_max_position_embeddings": 8}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    growth = {"first_selection_step": 2, "window_size": 2, "max_selected_layers": 2, "max_loop_depth": 2}
    model = {"rotary_scaling": scaling, "init_method_std": 0.1, "num_query_groups": 2, "vocab_size": VOCAB_SIZE}
    write_run(tmp_path / "run", small_config(model=model, growth=growth))
    first, parity = checked_export(tmp_path / "run", tmp_path / "first", options=FP32)
    assert parity is not None and parity.passed, [check.line() for check in parity.checks]
    _, served = checked_export(tmp_path / "run", tmp_path / "served", options=replace(FP32, form=SERVING))
    assert served is not None and served.passed, [check.line() for check in served.checks]
    by_layers = check_parity_by_layers(first)
    assert by_layers.passed and "rotary positions" in by_layers.checks[2].name
    import_model(first.folder, tmp_path / "root")
    second = export_checkpoint(tmp_path / "root", tmp_path / "second", options=FP32)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first.folder, second.folder)]
    assert configs[0] == configs[1] and configs[0]["rope_parameters"]["rope_type"] == kind
    files = [load_file(folder / "model.safetensors") for folder in (first.folder, second.folder)]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mistral", {"sliding_window": 40}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    ],
)
def test_within_its_window_a_model_is_the_same_without(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    original = save_hf_model(tmp_path / "hf", name, **settings)
    model, parity = again(tmp_path / "hf", tmp_path / "root")
    assert parity is not None and parity.passed
    assert "seq_length: 40" in (tmp_path / "root" / "run.yaml").read_text()
    assert model.config.max_position_embeddings == 40 and getattr(model.config, "sliding_window", None) is None
    assert (logits(model, 40) - logits(original, 40)).abs().max() < 1e-5
    assert (logits(model) - logits(original)).abs().max() > 1e-3, "beyond it the window bites"
    with pytest.raises(ConfigError, match=r"--seq-length: 41 tokens are more than sliding_window 40.*give 40 at most"):
        import_model(tmp_path / "hf", tmp_path / "other", seq_length=41)
    assert not (tmp_path / "other").exists()


def test_stored_frequencies_are_those_of_the_scaling(tmp_path: Path) -> None:
    """Older versions of transformers saved them; they are compared and left out."""
    from safetensors.torch import save_file

    original = save_hf_model(tmp_path / "hf", "llama_3.1")
    file = tmp_path / "hf" / "model.safetensors"
    stored = {"model.layers.0.self_attn.rotary_emb.inv_freq": original.model.rotary_emb.inv_freq.clone()}
    save_file({**load_file(file), **stored}, file)
    done = import_model(tmp_path / "hf", tmp_path / "root")
    assert not set(stored) & set(load_file(done.folder / file_name("weights", 0, 1)))
