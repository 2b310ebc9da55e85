"""transformers' own tests of models, run on the classes of exported models.

``tests/helpers/transformers_suite.py`` says where they come from, and which are to be had.
"""

from __future__ import annotations

import functools
import unittest
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from megatron_sgt.export.hf import modeling_sgt
from megatron_sgt.export.hf.configuration_sgt import SGTConfig
from tests.helpers.commands import REQUIRED
from tests.helpers.exhaustive import exhaustive
from tests.helpers.hf_models import hf_config, random_ids
from tests.helpers.transformers_suite import load_suite, suite_folder

pytestmark = pytest.mark.skipif(
    not suite_folder().is_dir() and not REQUIRED, reason="make transformers-suite downloads transformers' own tests"
)

OLD_TRANSFORMERS = transformers.__version__.startswith("4.")
KINDS = {
    "MODEL_MAPPING": "SGTModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING": "SGTForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "SGTForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": "SGTForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING": "SGTForQuestionAnswering",
}

# Tests that cannot apply, and why. They are skipped by themselves, or fail.
CANNOT = {
    "test_attn_implementation_composite_models": "the model is one, not several",
    "test_can_set_attention_dynamically_composite_model": "the model is one, not several",
    "test_sdpa_can_dispatch_composite_models": "the model is one, not several",
    "test_internal_model_config_and_subconfig_are_same": "the model is one, not several",
    "test_can_load_with_*": "needs an accelerator",
    "test_*_offload*": "needs an accelerator",
    "test_flex_attention_with_grads": "needs an accelerator",
    "test_model_parallel*": "needs several accelerators",
    "test_multi_gpu_data_parallel_forward": "needs several accelerators",
    "test_*_with_deepspeed*": "needs an accelerator",
    "test_sdpa_can_compile_dynamic": "needs an accelerator",
    "test_sdpa_can_dispatch_on_flash": "needs an accelerator",
    "test_flash_attn_*": "needs flash attention, which needs an accelerator",
    "test_kernels_can_load_without_crashing": "needs an accelerator",
    "test_torch_compile_for_training": "is slow; tests/export/hf/test_torch_export.py and test_modeling_sgt.py compile",
    "test_torch_export": "is slow; tests/export/hf/test_torch_export.py exports",
    "test_torch_fx*": "transformers traces a list of its own models alone",
    "test_torchscript_*": "transformers 4 skips them for every model, transformers 5 has none",
    "test_head*": "heads are not masked or removed: transformers 5 cannot either",
    "test_keep_in_fp32_modules*": "no module needs another type",
    "test_capture_outputs_decorator": "outputs are collected without the decorators, which differ between 4 and 5",
    "test_can_capture_specific_layers_hidden_states": "asks for these decorators; test_modeling_sgt.py has it",
    "test_can_load_from_already_mapped_keys": "weights are stored under the names of the model",
    "test_reverse_loading_mapping": "weights are stored under the names of the model",
    "test_eager_matches_batched_and_grouped_inference*": "there are no experts",
    "test_moe_models_record_router_logits": "there are no experts",
    "test_output_router_logits_from_config": "there are no experts",
    "test_encoder_decoder_loss_no_double_shift": "there is no encoder",
    "test_*tp_plan*": "transformers' tensor-parallel plans are not offered",
    "test_resize_position_vector_embeddings": "positions are rotary",
    "test_vision_axial_rope": "there are no images",
    "test_model_rope_scaling_from_config_1_dynamic": "frequencies that depend on a text's length are refused",
    "test_model_rope_scaling_frequencies": "tries such frequencies too; test_rotary_sgt.py has the others",
    "test_model_rope_with_partial_rotation": "every dimension of a head is rotated",
    "test_sliding_window_mask": "there are no windows",
    "test_generation_tester_mixin_inheritance": "the tests of generation are not in the source distribution",
}
if OLD_TRANSFORMERS:
    CANNOT["test_can_init_all_missing_weights"] = "transformers 4 knows the age of its own models alone"
# They take seconds: many inputs in three types, and a model saved in three types in another process.
COSTLY = ("test_eager_matches_sdpa_inference*", "test_bc_torch_dtype")


class ModelTester:
    """What transformers' tests ask of a model: its size, a configuration, inputs."""

    is_training = True
    batch_size, seq_length = 3, 7
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 96
    base_model_class = modeling_sgt.SGTModel

    def get_config(self) -> SGTConfig:
        loops = {"0": {"heads": [0, 3], "depth": 2}, "1": {"heads": [1], "depth": 1, "other_gate": 0.3}}
        small = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8}
        return hf_config("grouped_qk_norm_depth_3", sgt_loops=loops, **small)

    def prepare_config_and_inputs_for_common(self) -> tuple[SGTConfig, dict[str, Any]]:
        tokens = random_ids(self.batch_size, self.seq_length)
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@functools.cache
def model_tests() -> Any:
    """transformers' tests as a class of unittest, with our models."""

    class Tests(load_suite("test_modeling_common").ModelTesterMixin, unittest.TestCase):  # type: ignore[misc]
        all_model_classes = tuple(getattr(modeling_sgt, name) for name in KINDS.values())
        test_can_init_all_missing_weights_before_2023 = True  # whatever year the file names

        def setUp(self) -> None:
            self.model_tester = ModelTester()

    return Tests


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For transformers' tests SGT is one of transformers' models, and the library says what it has to say."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()  # the tools of this project silence it, for the whole process
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "sgt", SGTConfig)
    for table, name in KINDS.items():
        monkeypatch.setitem(getattr(modeling_auto, f"{table}_NAMES"), "sgt", name)
        monkeypatch.setitem(getattr(modeling_auto, table)._extra_content, SGTConfig, getattr(modeling_sgt, name))
    yield
    transformers_logging.set_verbosity(before)


def matches(name: str, patterns: Any) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def run(names: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """What failed of the tests ``names``, and what was skipped, with the last line of each."""
    result = unittest.TestResult()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unittest.TestSuite(model_tests()(name) for name in names).run(result)
    failed, skipped = (
        {test.id().split(" ")[0].rpartition(".")[2]: text.strip().splitlines()[-1] for test, text in group}
        for group in (result.failures + result.errors, result.skipped)
    )
    return failed, skipped


def names_of_tests() -> list[str]:
    return [str(name) for name in unittest.TestLoader().getTestCaseNames(model_tests())]


@pytest.mark.parametrize("costly", [False, exhaustive(True)], ids=["quick", "costly"])
def test_transformers_own_tests_of_models_pass(costly: bool) -> None:
    names = [name for name in names_of_tests() if not matches(name, CANNOT) and matches(name, COSTLY) == costly]
    failed, skipped = run(names)
    assert not failed, failed
    # Every variant of a test in COSTLY runs that this version has an answer to.
    assert costly or not skipped, f"name them in CANNOT, with the reason: {skipped}"
    assert len(names) >= (20 if costly else 40)


@pytest.mark.exhaustive
def test_no_test_is_left_out_that_passes() -> None:
    names = [name for name in names_of_tests() if matches(name, CANNOT)]
    failed, skipped = run(names)
    assert not set(names) - set(failed) - set(skipped)
