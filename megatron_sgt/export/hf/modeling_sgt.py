"""Sparse Growing Transformer (arXiv 2603.23998) for transformers 4.57 and 5.

A layer is x ← x + Attn(Norm₁(x)); then, ``depth`` times, x ← x + W_o · concat_h(head_h(Norm₁(x))) over the heads h
that it keeps looping, with the same weights; then x ← x + MLP(Norm₂(x)). Only the kept heads are computed in the
loops.

Shapes: B batch, S new tokens, T all tokens so far, D hidden, N query heads.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .attention_sgt import (
    CachedPass,
    SGTAttention,
    SGTHeadLoop,
    SGTRMSNorm,
    make_room_for_loops,
)
from .configuration_sgt import SGTConfig
from .rotary_sgt import SGTRotaryEmbedding

_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters  # they differ between transformers 4 and 5


def _norm(config: SGTConfig) -> nn.Module:
    kind = SGTRMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.rms_norm_eps)


class SGTMLP(nn.Module):
    """down(act(gate(x)) · up(x)), or without gate down(act(up(x)))."""

    def __init__(self, config: SGTConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, D]."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SGTDecoderLayer(GradientCheckpointingLayer):
    """Attention, its loops, MLP. ``first_pass``: index in the cache of its first attention pass."""

    def __init__(self, config: SGTConfig, layer_idx: int, first_pass: int) -> None:
        super().__init__()
        loop = config.loop_of(layer_idx)
        self.depth, self.block_loops = loop["depth"], loop["block_loops"]
        self.first_pass = first_pass
        self.self_attn = SGTAttention(config, layer_idx)
        self.loop = SGTHeadLoop(config, layer_idx)
        self.mlp = SGTMLP(config)
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Any,
        cache_position: Tensor,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, S, D] -> (x, weights of the ordinary attention [B, N, S, T] where the implementation has them)."""
        index = self.first_pass
        weights = None
        for _ in range(1 + self.block_loops):
            cached = CachedPass(past_key_values, index, cache_position)
            out, weights = self.self_attn(self.input_layernorm(x), rotary, mask, cached, **kwargs)
            x, index = x + out, index + 1
            for _ in range(self.depth):
                cached = CachedPass(past_key_values, index, cache_position)
                x = x + self.loop(self.self_attn, self.input_layernorm(x), rotary, mask, cached, **kwargs)
                index += 1
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x, weights


class SGTPreTrainedModel(PreTrainedModel):
    """What transformers must know of the architecture."""

    config_class = SGTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SGTDecoderLayer"]  # noqa: RUF012 (as in transformers)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class SGTModel(SGTPreTrainedModel):
    """The decoder without its output projection."""

    def __init__(self, config: SGTConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        passes = [config.passes_of(n) for n in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(
            [SGTDecoderLayer(config, n, sum(passes[:n])) for n in range(config.num_hidden_layers)]
        )
        self.norm = _norm(config)
        self.rotary_emb = SGTRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """As LlamaModel.forward. ``attentions`` are those of the ordinary passes, one per layer.

        transformers 4 passes ``cache_position`` [S]; named as an argument, transformers 5 would warn of it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        config = self.config
        attentions_too = config.output_attentions if output_attentions is None else output_attentions
        states_too = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        make_room_for_loops(past_key_values, config)
        cache_position = kwargs.pop("cache_position", None)
        if cache_position is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            cache_position = torch.arange(x.shape[1], device=x.device) + seen
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        mask = _causal_mask(config, x, attention_mask, cache_position, past_key_values, position_ids)
        rotary = self.rotary_emb(x, position_ids)
        kwargs |= {"position_ids": position_ids, "output_attentions": attentions_too}
        states, attentions = [], []
        for layer in self.layers:
            states.append(x)
            x, weights = layer(x, rotary, mask, cache_position, past_key_values=past_key_values, **kwargs)
            attentions.append(weights)
        x = self.norm(x)
        outputs = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, x) if states_too else None,
            attentions=tuple(attentions) if attentions_too else None,
        )
        return outputs if _wants_dict(return_dict, config) else outputs.to_tuple()


def _causal_mask(
    config: SGTConfig,
    x: Tensor,
    attention_mask: Tensor | None,
    cache_position: Tensor,
    cache: Cache | None,
    position_ids: Tensor,
) -> Any:
    embeds = "inputs_embeds" if "inputs_embeds" in _MASK_ARGUMENTS else "input_embeds"
    arguments = {embeds: x, "position_ids": position_ids}
    if "cache_position" in _MASK_ARGUMENTS:
        arguments["cache_position"] = cache_position
    return create_causal_mask(config=config, attention_mask=attention_mask, past_key_values=cache, **arguments)


def _wants_dict(return_dict: bool | None, config: SGTConfig) -> bool:
    return config.return_dict if return_dict is None else return_dict


class SGTForCausalLM(SGTPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (as in transformers)

    def __init__(self, config: SGTConfig) -> None:
        super().__init__(config)
        self.model = SGTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """As LlamaForCausalLM.forward: logits [B, S, vocabulary], and the loss if ``labels`` [B, S] are given."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result if _wants_dict(return_dict, self.config) else result.to_tuple()


__all__ = ["SGTForCausalLM", "SGTModel", "SGTPreTrainedModel"]
