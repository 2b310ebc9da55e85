"""What is said about a key that the configuration does not know."""

import pytest

from megatron_sgt.config import Config, ModelConfig
from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.config.hints import (
    DEEPSPEED_KEYS,
    FOREIGN_NAMES,
    all_keys,
    misspelt_deepspeed_key,
    section_at,
    unknown_key,
)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model.num_layer", "unknown key 'model.num_layer'; did you mean 'num_layers'?"),
        ("model.num-layers", "did you mean 'num_layers'?"),
        ("model.hidden_sise", "did you mean 'hidden_size'?"),
        ("model.n_layers", "did you mean 'model.num_layers'?"),
        ("model.lr", "did you mean 'optim.lr'?"),
        ("num_layers", "did you mean 'model.num_layers'?"),
        ("grwoth", "did you mean 'growth'?"),
        ("model.model_parallel_size", "did you mean 'parallel.tensor_model_parallel_size'?"),
        ("model.max_seq_len", "did you mean 'model.seq_length'?"),
        ("train.train_micro_batch_size_per_gpu", "did you mean 'train.micro_batch_size'?"),
        ("model.max_position_embeddings", "did you mean 'model.seq_length'?"),
        ("model.rope_theta", "did you mean 'model.rotary_base'?"),
        ("model.tie_word_embeddings", "'model.untie_embeddings_and_output_weights' (its opposite)?"),
        ("train.gradient_accumulation_steps", "accumulation follows from the batch sizes"),
        ("parallel.pp", "did you mean 'parallel.pipeline_model_parallel_size'?"),
        ("parallel.num-layers-per-virtual-pipeline-stage", "virtual_pipeline_model_parallel_size' (parts of a stage)?"),
        ("optim.windowsize", "did you mean 'growth.window_size'?"),
        ("logging.zzz", "unknown key 'logging.zzz'; known here: run_dir, log_interval,"),
        ("zzz", "known here: model, growth,"),
        ("data.tokenizer.zzz", "unknown key 'data.tokenizer.zzz'; known here: type, model"),
    ],
)
def test_unknown_key(key: str, hint: str) -> None:
    assert hint in unknown_key(Config, tuple(key.split(".")))


def test_every_foreign_name_points_at_a_field_of_ours() -> None:
    ours = set(all_keys(Config))
    targets = {part for target in FOREIGN_NAMES.values() for part in target.partition(" (")[0].split(" and ")}
    assert targets <= ours
    # Rotary scaling has Hugging Face's names, among them one that means the sequence length elsewhere.
    names = {key.rpartition(".")[2] for key in ours if not key.startswith("model.rotary_scaling.")}
    assert not FOREIGN_NAMES.keys() & names


def test_sections_and_keys() -> None:
    assert section_at(Config, ("model",)) is ModelConfig
    assert section_at(Config, ("data", "tokenizer")) is TokenizerConfig
    assert section_at(Config, ("model", "num_layers")) is None
    assert section_at(Config, ("modl",)) is None
    assert {"model", "model.num_layers", "data.tokenizer.type", "deepspeed"} <= set(all_keys(Config))


def test_deepspeed_keys_that_are_nearly_known() -> None:
    assert not [key for key in DEEPSPEED_KEYS if misspelt_deepspeed_key(key)]
    assert misspelt_deepspeed_key("zero_optimisation") == "zero_optimization"
    assert misspelt_deepspeed_key("steps_per_prints") == "steps_per_print"
    assert misspelt_deepspeed_key("something_of_a_later_version") is None
