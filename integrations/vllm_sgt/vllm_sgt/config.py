"""What vLLM reads of an exported folder's ``config.json``, so that the folder's own code need not run."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class SGTConfig(PretrainedConfig):
    """``model_type`` sgt: every entry of ``config.json`` is an attribute, under its name."""

    model_type = "sgt"

    def __init__(self, **entries: Any) -> None:
        for name, value in entries.items():
            if name not in ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"):
                setattr(self, name, value)
        super().__init__(**entries)


class SGTServingConfig(SGTConfig):
    """The serving form of the same model: ``num_hidden_layers`` counts attention passes."""

    model_type = "sgt_serving"

    # Without one of its own, transformers 5 makes one that reads rope_scaling before max_position_embeddings is set.
    __init__ = SGTConfig.__init__


CONFIGS = (SGTConfig, SGTServingConfig)
