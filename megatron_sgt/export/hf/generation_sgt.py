"""Generation of exported models where it is not transformers' own."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.generation import GenerationMixin

from .cache_sgt import refuse_runtime


class SGTGenerationMixin(GenerationMixin):
    """transformers' generation."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', through which ``generate_batch`` goes too.

        Raises:
            ValueError: layers loop, and this is the standard form; else its requests would fail one by one.
        """
        if not self._supports_attention_backend and self.config.loops():
            refuse_runtime("continuous batching")
        return super().init_continuous_batching(*args, **kwargs)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Texts without a token begin as ``generate`` without input does, and do not fail inside."""
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if ids is None or ids.shape[-1] or "inputs_embeds" in kwargs:
            return super().generate(inputs, *args, **kwargs)
        begin = self.generation_config.bos_token_id
        if begin is None:
            raise ValueError("input_ids holds no token and generation_config.bos_token_id is not set: give a token")
        rest = {name: value for name, value in kwargs.items() if name not in ("input_ids", "attention_mask")}
        return super().generate(ids.new_full((len(ids), 1), begin), *args, **rest)
