"""transformers' own tests of models, run on the classes of exported models.

``tests/helpers/transformers_suite.py`` says where they come from, and which are to be had.
"""

from __future__ import annotations

import functools
import unittest
from typing import Any

import pytest
import torch
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_sgt.export.hf import modeling_sgt
from megatron_sgt.export.hf.configuration_sgt import SGTConfig
from tests.helpers.hf_models import hf_config, random_ids
from tests.helpers.transformers_suite import load_suite

KINDS = {
    "MODEL_MAPPING": "SGTModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING": "SGTForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "SGTForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": "SGTForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING": "SGTForQuestionAnswering",
}


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

        def setUp(self) -> None:
            self.model_tester = ModelTester()

    return Tests


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """For transformers' tests SGT is one of transformers' models."""
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "sgt", SGTConfig)
    for table, name in KINDS.items():
        monkeypatch.setitem(getattr(modeling_auto, f"{table}_NAMES"), "sgt", name)
        monkeypatch.setitem(getattr(modeling_auto, table)._extra_content, SGTConfig, getattr(modeling_sgt, name))
