"""Configuration of a Sparse Growing Transformer for runtimes that keep a cache of their own."""

from __future__ import annotations

from typing import Any

from .configuration_sgt import SGTConfig


class SGTServingConfig(SGTConfig):
    """An ``SGTConfig`` whose attention passes are what a runtime counts as layers.

    Args (beyond those of ``SGTConfig``):
        num_hidden_layers: attention passes: the layers, and their loops. It follows from the others; a runtime makes
            as many caches.
        sgt_num_layers: layers.

    Raises:
        ValueError: ``num_hidden_layers`` is not the number of passes; ``sgt_loops`` does not fit the layers.
    """

    model_type = "sgt_serving"
    base_model_tp_plan = {  # noqa: RUF012 (as in transformers)
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    def __init__(self, num_hidden_layers: int | None = None, sgt_num_layers: int = 24, **kwargs: Any) -> None:
        self.sgt_num_layers = sgt_num_layers
        super().__init__(num_hidden_layers=sgt_num_layers, **kwargs)
        self.num_hidden_layers = sum(self.passes_of(n) for n in range(sgt_num_layers))
        if num_hidden_layers is not None:
            self.check_passes(num_hidden_layers)

    def check_passes(self, found: int) -> None:
        """Refuse, with ValueError, a number of passes that the layers and their loops do not have."""
        wanted = sum(self.passes_of(n) for n in range(self.sgt_num_layers))
        if found != wanted:
            raise ValueError(
                f"num_hidden_layers {found}: {self.sgt_num_layers} layers with these sgt_loops have {wanted} attention "
                "passes; leave it as it was exported"
            )
