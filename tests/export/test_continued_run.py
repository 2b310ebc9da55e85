"""The run that continues an imported model: its file, what it may change, and the growth it begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.config import load_config
from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.export.continued_run import fitting_config, growth_state, run_config, run_yaml
from megatron_sgt.export.hf.families import HFModel
from megatron_sgt.growth import build_schedule

FIELDS: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 96, "activation": "swiglu",
    "ffn_hidden_size": 48, "num_query_groups": 2, "kv_channels": 8, "layernorm_epsilon": 1e-5,
}  # fmt: skip
PLAIN = HFModel("llama", {**FIELDS, "rotary_scaling": None}, 8192)
SCALED = HFModel(
    "llama",
    {**FIELDS, "rotary_scaling": {"type": "linear", "factor": 4.0, "context_length": 8192}},
    8192,
)
WINDOWED = HFModel("mistral", FIELDS, 8192, window=32)
GROWN = HFModel("sgt", FIELDS, 64, {"3": {"heads": [3, 1], "depth": 2}, "1": {"heads": [0], "depth": 1}})
BLOCKS = HFModel("sgt", FIELDS, 64, {"2": {"heads": [], "depth": 0, "block_loops": 2}})
ROOT = Path("imports") / "a"


def write(path: Path, model: HFModel) -> Path:
    tokenizer = TokenizerConfig(type="huggingface", model="imports/a/tokenizer")
    config = run_config(model, ROOT, tokenizer, None, None)
    path.write_text(run_yaml(config, Path("folder"), path, bool(model.loops)))
    assert load_config(path) == config
    return path


def test_the_file_says_what_the_weights_need(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "run.yaml", PLAIN))
    assert {name: getattr(config.model, name) for name in FIELDS} == FIELDS
    assert "rotary_scaling" not in (tmp_path / "run.yaml").read_text()
    assert (config.model.seq_length, config.model.make_vocab_size_divisible_by) == (4096, 32)
    assert (config.checkpoint.load, config.growth.method) == (str(ROOT), "sgt")
    assert config.data.tokenizer is not None and config.data.tokenizer.type == "huggingface"


@pytest.mark.parametrize(
    ("vocabulary", "asked", "rows"), [(256, None, 256), (96, None, 96), (97, None, 128), (96, 40, 120)]
)
def test_padding(vocabulary: int, asked: int | None, rows: int) -> None:
    model = HFModel("llama", {**FIELDS, "vocab_size": vocabulary}, 64)
    config = run_config(model, ROOT, None, 16, asked)
    assert (config.model.padded_vocab_size(), config.model.seq_length) == (rows, 16)


def test_a_plain_model_has_no_growth_yet() -> None:
    assert growth_state(PLAIN, run_config(PLAIN, ROOT, None, None, None)) == {}
    single = HFModel("llama", {**FIELDS, "num_layers": 1}, 64)
    assert run_config(single, ROOT, None, None, None).growth.method == "vanilla"


def test_a_grown_model_goes_on_with_its_loops(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "run.yaml", GROWN))
    schedule = build_schedule(config.growth, 4, 4)
    schedule.load_state_dict(growth_state(GROWN, config)["growth"]["schedule"])
    assert schedule.phase == "fixed" and not schedule.wanted
    assert [(n, plan.loops, plan.kept_heads, plan.other_gate) for n, plan in schedule.plan.layers] == [
        (1, 1, (0,), 0.0),
        (3, 2, (1, 3), 0.0),
    ]
    assert schedule.after_step(1) == [] and schedule.plan == schedule.plan.inference()


def test_a_block_loop_goes_on() -> None:
    config = run_config(BLOCKS, ROOT, None, None, None)
    schedule = build_schedule(config.growth, 4, 4)
    schedule.load_state_dict(growth_state(BLOCKS, config)["growth"]["schedule"])
    assert [(n, plan.block_loops) for n, plan in schedule.plan.layers] == [(2, 2)]


def test_mixed_loops_are_refused() -> None:
    mixed = HFModel("sgt", FIELDS, 64, {**GROWN.loops, **BLOCKS.loops})
    with pytest.raises(ConfigError, match="not both"):
        run_config(mixed, ROOT, None, None, None)


@pytest.mark.parametrize(
    ("model", "change", "says"),
    [
        (
            PLAIN,
            ("hidden_size: 32", "hidden_size: 64"),
            "model.hidden_size: is 64, the imported model has 32",
        ),
        (
            PLAIN,
            ("vocab_size: 96", "vocab_size: null"),
            "model.vocab_size: is None, the imported model has 96",
        ),
        (GROWN, ("method: sgt", "method: vanilla"), "growth.method: is vanilla"),
        (SCALED, ("factor: 4.0", "factor: 2.0"), "model.rotary_scaling: is {'type': 'linear', 'factor': 2.0}, the"),
        (PLAIN, ("num_layers: 4", "num_layers: 4\n  rotary_scaling: {type: linear, factor: 2}"), "model has None"),
        (WINDOWED, ("seq_length: 32", "seq_length: 33"), "model.seq_length: 33 tokens are more than sliding_window 32"),
    ],
)
def test_a_file_of_another_model_is_refused(model: HFModel, change: tuple[str, str], says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", model)
    assert fitting_config(path, model) == load_config(path)
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ConfigError) as refused:
        fitting_config(path, model)
    assert says in str(refused.value)


def test_a_file_need_not_name_the_context_of_an_export(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", SCALED)
    path.write_text(path.read_text().replace("    context_length: 8192\n", ""))
    scaling = fitting_config(path, SCALED).model.rotary_scaling
    assert scaling is not None and scaling.context_length is None


def test_a_file_may_choose_its_own_growth(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", PLAIN)
    path.write_text(path.read_text().replace("top_k_layers: 3", "top_k_layers: 2\n  window_size: 7"))
    assert fitting_config(path, PLAIN).growth.window_size == 7
