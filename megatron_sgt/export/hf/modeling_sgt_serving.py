"""Sparse Growing Transformer for runtimes that keep a cache of their own: vLLM, SGLang, continuous batching.

The same weights and the same function as ``modeling_sgt.py``. A runtime sees one layer per attention pass.

Shapes: B batch, S new tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# Of a folder's files transformers 4 copies those that this one names, not what they import in turn.
from .attention_sgt import SGTAttention  # noqa: F401
from .attention_sgt_serving import SGTPass, SGTServingAttention, passes_of, rank_in_runtime
from .cache_sgt import refuse_runtime  # noqa: F401
from .configuration_sgt import SGTConfig  # noqa: F401
from .configuration_sgt_serving import SGTServingConfig
from .generation_sgt import SGTGenerationMixin  # noqa: F401
from .mask_sgt import causal_mask
from .mlp_sgt import mlp_of
from .modeling_sgt import SGTForCausalLM, SGTPreTrainedModel
from .norms_sgt import SGTNorms, norm_of
from .outputs_sgt import chosen_states, wants_dict
from .rotary_sgt import SGTRotaryEmbedding


class SGTServingLayer(SGTNorms, GradientCheckpointingLayer):
    """Attention, its loops, MLP. The passes belong to the model, which has one list of all."""

    def __init__(self, config: SGTServingConfig, layer_idx: int) -> None:
        super().__init__()
        self.blocks = 1 + config.loop_of(layer_idx)["block_loops"]
        self.self_attn = SGTServingAttention(config, layer_idx)
        self.mlp = mlp_of(config)
        self.make_norms(config)

    def forward(self, hidden_states: Tensor, passes: Sequence[SGTPass], **kwargs: Any) -> Tensor:
        """hidden_states [B, S, D] -> [B, S, D]; the rest as the attention's."""
        x, each = hidden_states, len(passes) // self.blocks
        for block in range(self.blocks):
            for attend in passes[block * each : (block + 1) * each]:
                x = x + self.attention_output(self.self_attn(self.attention_input(x), attend=attend, **kwargs))
            x = x + self.mlp_output(x)
        return x


class SGTServingModel(SGTPreTrainedModel):
    """The decoder without its output projection.

    ``passes`` is one list for the whole model: runtimes take the only number in a module's name for its layer.
    """

    config_class = SGTServingConfig
    _no_split_modules = ["SGTServingLayer"]  # noqa: RUF012 (as in transformers)
    _supports_attention_backend = True

    def __init__(self, config: SGTServingConfig) -> None:
        super().__init__(config)
        config.check_passes(config.num_hidden_layers)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([SGTServingLayer(config, n) for n in range(config.sgt_num_layers)])
        each = passes_of(config)
        self.passes = nn.ModuleList([attend for passes in each for attend in passes])
        self._ends = [sum(len(passes) for passes in each[: n + 1]) for n in range(len(each))]
        self._rank = rank_in_runtime()
        self.norm = norm_of(config)
        self.rotary_emb = SGTRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def supports_pp_plan(self) -> bool:
        """Asked before the layers are dealt out to pipeline stages, by their number, which is that of the passes.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self.config.sgt_num_layers} layers with {self.config.num_hidden_layers} attention passes cannot be cut "
            "into pipeline stages here: use tensor parallelism"
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """As LlamaModel.forward; hidden states are those of the layers, attentions are not given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        config = self.config
        if config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions: the form for serving gives none; export it --for standard")
        states_too = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        cache_position = kwargs.pop("cache_position", None)
        if cache_position is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            cache_position = torch.arange(x.shape[1], device=x.device) + seen
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        kwargs["mask"] = causal_mask(config, x, attention_mask, cache_position, past_key_values, position_ids)
        kwargs["cos"], kwargs["sin"] = self.rotary_emb(x, position_ids)
        kwargs |= {"position_ids": position_ids, "cache_position": cache_position, "past_key_values": past_key_values}
        states = [x]
        for n, layer in enumerate(self.layers):
            if self._ends[n] > config.num_hidden_layers:  # a draft of it exits early
                break
            first = self._ends[n - 1] if n else 0
            passes = [self.passes[index] for index in range(first, self._ends[n])]
            x = layer(x, passes=passes, rank=self._rank_of(layer), **kwargs)
            states.append(x)
        states[-1] = x = self.norm(x)
        outputs = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=chosen_states(states, states_too) if states_too else None,
        )
        return outputs if wants_dict(return_dict, config) else outputs.to_tuple()

    def _rank_of(self, layer: Any) -> int | None:
        return self._rank if self._rank is not None else layer.self_attn.rank()


class SGTServingForCausalLM(SGTForCausalLM):
    """The language model."""

    config_class = SGTServingConfig
    decoder_class = SGTServingModel
    _no_split_modules = ["SGTServingLayer"]  # noqa: RUF012 (as in transformers)
    _supports_attention_backend = True


__all__ = ["SGTServingForCausalLM", "SGTServingModel"]
