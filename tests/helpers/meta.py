"""The project's own model, of any size, on the meta device: shapes without memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_sgt.config import Config
from megatron_sgt.config.pipeline import AUTO
from megatron_sgt.model.gpt import LanguageModel, build_model
from tests.helpers.single import single_groups, small_config

META = torch.device("meta")


def meta_model(config: Config, precision: str = "bf16") -> LanguageModel:
    """``config``'s model as one rank of one would build it."""
    alone = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": 1,
        "pipeline_model_parallel_layout": AUTO,
        "sequence_parallel": False,
        "device": "cpu",
    }
    config = config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=alone),
            "model": config.model.model_copy(update={"use_cpu_initialization": True}),
        }
    )
    groups = replace(single_groups(small_config()), device=META)
    with META:
        model = build_model(config, groups, precision, 1 + config.growth.max_loop_depth)
    rotary = model.gpt.rotary_pos_emb
    rotary.inv_freq = rotary.inv_freq.to(META)  # no buffer: it stays behind otherwise
    return model
