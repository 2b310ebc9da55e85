"""From configuration and device to kernels, with a reason."""

import pytest
import torch

from megatron_sgt.config import DataConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.model.loop_backend import loop_backend
from megatron_sgt.ops import backend
from tests.helpers.single import small_config

CPU = torch.device("cpu")


def test_a_cpu_takes_torch() -> None:
    assert loop_backend(small_config(), "fp32", CPU) == ("torch", "loop kernels: torch, the device is cpu")


def test_a_forced_backend_that_cannot_run_is_a_mistake_of_the_configuration() -> None:
    config = small_config(train={"loop_backend": "triton"})
    with pytest.raises(ConfigError, match=r"train\.loop_backend is triton, but .*; use auto or torch"):
        loop_backend(config, "fp32", CPU)


def test_a_forced_attention_needs_the_kernels() -> None:
    config = small_config(train={"loop_attention": "custom"})
    with pytest.raises(ConfigError, match=r"loop_attention is custom, .* the device is cpu"):
        loop_backend(config, "fp32", CPU)
    config = small_config(train={"loop_attention": "library"})
    assert loop_backend(config, "fp32", CPU)[0] == "torch"


def test_the_line_names_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = small_config(train={"loop_backend": "triton"}, model={"kv_channels": 64})
    line = loop_backend(config, "fp32", CPU)[1]
    assert line.endswith("attention of 2 x 2 heads of size 64 over 32 tokens: custom")
    entry = {"seq_length_curriculum": [{"until_steps": 1, "seq_length": 8}]}
    shorter = loop_backend(config.model_copy(update={"data": DataConfig.model_validate(entry)}), "fp32", CPU)[1]
    assert shorter == line.replace(
        "; attention", "; attention of 8 x 2 heads of size 64 over 8 tokens: library; attention"
    )
    forced = small_config(train={"loop_backend": "triton", "loop_attention": "library"}, model={"kv_channels": 64})
    assert loop_backend(forced, "fp32", CPU)[1].endswith("tokens: library (train.loop_attention)")
