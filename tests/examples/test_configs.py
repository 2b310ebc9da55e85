"""Every example configuration loads, has the size that its name and comment say, and differs from its twin in
nothing but the method."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.config import Config, load_config
from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.config.phases import phases_of
from megatron_sgt.export.architecture import TokenIds, hf_config
from megatron_sgt.export.continued_run import fitting_config
from megatron_sgt.export.hf.families import read_model
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.planning.pipeline import pipeline_layout
from megatron_sgt.stages.presets import preset_named
from megatron_sgt.stages.stages import stages_of
from megatron_sgt.stages.timing import fitted_parameters, g_stack_time, prop_boundaries

FOLDER = Path(__file__).parents[2] / "examples" / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
VOCAB_SIZE = 32000
SIZES = {"300m": 300e6, "1.2b": 1.2e9, "7b": 7e9, "13b": 13e9, "70b": 70e9}


def load(name: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml")


def count_parameters(model: ModelConfig) -> tuple[int, int]:
    """Return the parameters of a decoder without biases and q/k norms: all, and all but the vocabulary's."""
    assert (model.activation, model.normalization) == ("swiglu", "RMSNorm")
    assert model.untie_embeddings_and_output_weights
    assert not (model.add_bias_linear or model.add_qkv_bias or model.qk_layernorm)
    hidden, head = model.hidden_size, model.kv_channels
    attention = hidden * head * (2 * model.num_attention_heads + 2 * model.num_query_groups)
    layer = attention + 3 * hidden * model.ffn_hidden_size + 2 * hidden
    inner = model.num_layers * layer + hidden
    return inner + 2 * hidden * model.padded_vocab_size(VOCAB_SIZE), inner


def differences(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> set[str]:
    """Return the dotted names of the values in which two nested mappings differ."""
    found = set()
    for key in left.keys() | right.keys():
        a, b = left.get(key), right.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.add(prefix + key)
    return found


GROWING = {
    "g_stack_7b": "vanilla_7b",
    "midas_1.2b": "vanilla_1.2b",
    "msg_1.2b": "vanilla_1.2b",
    "compound_grow_1.2b": "vanilla_1.2b",
    "auto_prog_1.2b": "vanilla_1.2b",
}
"""Runs of growing models, and the one whose model they end with."""


@pytest.mark.parametrize("name", NAMES)
def test_loads_and_round_trips(name: str, tmp_path: Path) -> None:
    cfg = load(name)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(cfg.to_yaml())
    assert load_config(resolved) == cfg


def test_the_set_is_complete() -> None:
    expected = {f"{kind}_{size}" for kind in ("sgt", "vanilla") for size in SIZES}
    expected |= {"quickstart", "vanilla_quickstart", "block_loop_300m", "quickstart_pipeline", "sgt_70b_pipeline"}
    expected |= {"continue_llama_3.2_1b", "phases_1.2b", "sgt_300m_documents"}
    expected |= {"sgt_300m_lowest_heads", "sgt_300m_shallow_first", "study_cpu", "study_gpu", "study_growing"}
    expected |= set(GROWING)
    assert set(NAMES) == expected
    assert len({load(name).logging.run_dir for name in NAMES}) == len(NAMES)


TWINS = [
    *((f"sgt_{size}", f"vanilla_{size}", {"growth.method"}) for size in SIZES),
    ("quickstart", "vanilla_quickstart", {"growth.method"}),
    ("sgt_300m", "block_loop_300m", {"growth.method", "growth.block_loop_layers"}),
    ("sgt_300m", "sgt_300m_lowest_heads", {"growth.head_choice"}),
    ("sgt_70b", "sgt_70b_pipeline", {"parallel.pipeline_model_parallel_size"}),
    ("sgt_300m", "sgt_300m_shallow_first", {"growth.direction"}),
    (
        "sgt_300m",
        "sgt_300m_documents",
        {f"data.{name}" for name in ("packing", "reset_attention_mask", "reset_position_ids", "eod_mask_loss")},
    ),
]


@pytest.mark.parametrize(("name", "twin", "expected"), TWINS)
def test_twins_differ_in_the_method_alone(name: str, twin: str, expected: set[str]) -> None:
    assert differences(load(name).model_dump(), load(twin).model_dump()) == {*expected, "logging.run_dir"}


@pytest.mark.parametrize(("name", "size"), [(f"sgt_{label}", size) for label, size in SIZES.items()])
def test_size_is_that_of_the_name_and_comment(name: str, size: float) -> None:
    total, inner = count_parameters(load(name).model)
    # Names of this family count the layers, not the vocabulary; LLaMA's "7B" is 6.5 and 6.7 billion.
    assert inner == pytest.approx(size, rel=0.08)
    comment = (FOLDER / f"{name}.yaml").read_text()
    numbers = [int(text.replace(",", "")) for text in re.findall(r"\d{1,3}(?:,\d{3}){2,}", comment)]
    assert numbers == [total, inner]


@pytest.mark.parametrize("label", SIZES)
def test_recipe_of_the_paper(label: str) -> None:
    cfg = load(f"sgt_{label}")
    optim, growth = cfg.optim, cfg.growth
    assert (cfg.model.seq_length, cfg.train.global_batch_size) == (4096, 1024)
    assert (optim.adam_beta1, optim.adam_beta2, optim.weight_decay, optim.weight_decay_on) == (
        0.9,
        0.95,
        0.1,
        "all",
    )
    assert (optim.clip_grad, optim.lr_decay_style) == (1.0, "cosine")
    assert optim.min_lr == pytest.approx(optim.lr / 10)
    assert optim.lr <= 6e-4
    assert growth.first_selection_step == growth.window_size == optim.lr_warmup_iters
    assert growth.first_selection_step + growth.max_selected_layers * growth.window_size < cfg.train.train_iters


def test_the_phases_are_those_that_the_comments_say() -> None:
    config, one = load("phases_1.2b"), load("sgt_1.2b")
    assert config.tokens_per_step == one.tokens_per_step and config.growth == one.growth
    assert config.num_micro_batches(64) == 4
    names = [phase.name for phase in phases_of(config)]
    assert (names, config.batches.at(1), config.batches.at(config.train.train_iters)) == (
        ["ramp", "stable", "long", "annealing"],
        64,
        256,
    )
    assert config.seq_lengths.every == (4096, 16384)


@pytest.mark.parametrize(("name", "twin"), GROWING.items())
def test_a_growing_model_becomes_its_twin(name: str, twin: str) -> None:
    config = load(name)
    stages = stages_of(config)
    wanted = load(twin).model.model_copy(update={"seq_length": config.model.seq_length})
    assert stages[-1].config.model == wanted and stages[0].config.model != wanted
    layouts = [(stage.config.num_micro_batches(32), stage.config.data_parallel_size(32)) for stage in stages]
    assert len(set(layouts)) == 1
    for stage in stages:
        assert replace_model(stage.config, wanted) == replace_model(config, wanted)


def replace_model(config: Config, model: ModelConfig) -> Config:
    """``config`` with ``model`` and no growth section."""
    return config.model_copy(update={"model": model, "growth": GrowthConfig()})


def test_growing_models_have_the_numbers_of_their_sources() -> None:
    stack = load("g_stack_7b")
    ends = [stage.last for stage in stages_of(stack)]
    tokens_per_step = stack.train.global_batch_size * stack.model.seq_length
    assert tokens_per_step == pytest.approx(2e6, rel=0.05)
    assert [end * tokens_per_step for end in ends] == pytest.approx([10.5e9, 300e9], rel=1e-3)
    fit = g_stack_time(fitted_parameters(stages_of(stack)[-1].config.model), 300e9)
    assert fit.fitted == pytest.approx(20.1e9, rel=3e-3)  # as the file says
    midas = load("midas_1.2b")
    assert tuple(stage.until_steps for stage in midas.growth.stages) == prop_boundaries(midas.train.train_iters, 6, 2)
    for operator, preset in (("midas", "midas"), ("grad_stack", "grad-stack")):
        same = load_config(FOLDER / "vanilla_1.2b.yaml", preset=preset_named(preset))
        stages = tuple(stage.model_copy(update={"operator": operator}) for stage in midas.growth.stages)
        assert (same.model, same.growth.stages) == (midas.model, stages)
    depths = [stage.config.model.num_layers for stage in stages_of(load("auto_prog_1.2b"))]
    assert depths == [12, 16, 20, 24]


LLAMA_3_2_1B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
"""The published config.json."""


def test_llama_is_continued_by_a_run_of_its_own_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_2_1B))
    path = FOLDER / "continue_llama_3.2_1b.yaml"
    config = fitting_config(path, read_model(tmp_path))
    assert hf_config(config.model, LoopPlan.empty(16), 128256, "bf16", TokenIds()).items() >= LLAMA_3_2_1B.items()
    words = re.findall(r"\d{1,3}(?:,\d{3}){2,}", path.read_text())
    assert words == [f"{parameter_count(config.model):,}", f"{128256 * 2048:,}"]
    assert f"{config.train.train_iters * 64 * 8192 / 1e9:.1f} B tokens" in path.read_text()


def test_300m_is_the_paper_to_the_number() -> None:
    cfg = load("sgt_300m")
    assert (cfg.optim.lr, cfg.optim.min_lr, cfg.optim.lr_warmup_iters) == (6e-4, 6e-5, 250)
    assert cfg.train.train_iters * 1024 * 4096 == pytest.approx(20e9, rel=1e-3)


@pytest.mark.parametrize(
    ("label", "world_size"),
    [
        ("300m", 1),
        ("300m", 8),
        ("300m", 128),
        ("1.2b", 8),
        ("1.2b", 256),
        ("7b", 32),
        ("13b", 64),
        ("70b", 256),
        ("70b_pipeline", 64),
        ("70b_pipeline", 512),
    ],
)
def test_batches_multiply_on_the_machines_named(label: str, world_size: int) -> None:
    cfg = load(f"sgt_{label}")
    batches, replicas = cfg.num_micro_batches(world_size), cfg.data_parallel_size(world_size)
    assert batches * replicas * cfg.train.micro_batch_size == 1024


def test_quickstart_runs_on_two_cpu_ranks_and_fixes_its_structure() -> None:
    cfg = load("quickstart")
    growth, train = cfg.growth, cfg.train
    assert (cfg.parallel.device, cfg.data_parallel_size(2), cfg.num_micro_batches(2)) == ("cpu", 1, 2)
    last_decision = growth.first_selection_step + growth.max_selected_layers * growth.window_size
    assert last_decision < train.train_iters
    assert cfg.checkpoint.save_interval < train.train_iters
    # The comment's 1.3 M.
    assert count_parameters(cfg.model)[1] == pytest.approx(1.3e6, rel=0.03)


def test_a_pipeline_on_two_cpu_ranks_and_on_8_nodes() -> None:
    """Enough micro-batches that the stages seldom wait, in the one and in the other."""
    for name, ranks, stages, most in (("quickstart_pipeline", 2, 2, 1 / 9), ("sgt_70b_pipeline", 512, 8, 0.06)):
        config = load(name).with_vocab_size(VOCAB_SIZE)
        assert pipeline_layout(config).size == stages
        assert (stages - 1) / (config.num_micro_batches(ranks) + stages - 1) <= most
    cpu = load("quickstart_pipeline")
    growth = cpu.growth
    assert growth.first_selection_step + growth.max_selected_layers * growth.window_size < cpu.train.train_iters
