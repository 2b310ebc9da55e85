"""Sparse Growing Transformer (arXiv 2603.23998) for transformers 4.57 and 5.

A layer is x ← x + Attn(Norm₁(x)); then, ``depth`` times, x ← x + W_o · concat_h(head_h(Norm₁(x))) over the heads h
that it keeps looping, with the same weights; then x ← x + MLP(Norm₂(x)). Only the kept heads are computed in the
loops. With ``norm_position`` "output" it is x ← x + Norm₁(...(x)) and x ← x + Norm₂(MLP(x)).

Shapes: B batch, S new tokens, T all tokens so far, D hidden, N query heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .attention_sgt import (
    CachedPass,
    SGTAttention,
    SGTHeadLoop,
)
from .cache_sgt import check_runtime
from .configuration_sgt import SGTConfig
from .generation_sgt import SGTGenerationMixin
from .mask_sgt import causal_mask
from .mlp_sgt import mlp_of
from .norms_sgt import SGTNorms, norm_of
from .outputs_sgt import chosen_states, wants_dict
from .rotary_sgt import SGTRotaryEmbedding


class SGTDecoderLayer(SGTNorms, GradientCheckpointingLayer):
    """Attention, its loops, MLP. ``first_pass``: index in the cache of its first attention pass."""

    def __init__(self, config: SGTConfig, layer_idx: int, first_pass: int) -> None:
        super().__init__()
        loop = config.loop_of(layer_idx)
        self.depth, self.block_loops = loop["depth"], loop["block_loops"]
        self.first_pass = first_pass
        self.self_attn = SGTAttention(config, layer_idx)
        self.loop = SGTHeadLoop(config, layer_idx)
        self.mlp = mlp_of(config)
        self.make_norms(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache_position: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Hidden states [B, S, D] -> the same.

        With ``output_attentions`` also the weights [B, N, S, T] of the ordinary attention, where the implementation
        has them. Names and outputs are otherwise those of ``LlamaDecoderLayer``: tools call one layer on its own.
        """
        x, index, weights = hidden_states, self.first_pass, None
        rotary, mask = position_embeddings, attention_mask
        for _ in range(1 + self.block_loops):
            cached = CachedPass(past_key_values, index, cache_position)
            out, weights = self.self_attn(self.attention_input(x), rotary, mask, cached, **kwargs)
            x, index = x + self.attention_output(out), index + 1
            for _ in range(self.depth):
                cached = CachedPass(past_key_values, index, cache_position)
                out = self.loop(self.self_attn, self.attention_input(x), rotary, mask, cached, **kwargs)
                x, index = x + self.attention_output(out), index + 1
            x = x + self.mlp_output(x)
        return (x, weights) if kwargs.get("output_attentions") else x


class SGTPreTrainedModel(PreTrainedModel):
    """What transformers must know of the architecture."""

    config_class: type[SGTConfig] = SGTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SGTDecoderLayer"]  # noqa: RUF012 (as in transformers)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = False
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
        self.norm = norm_of(config)
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
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """As LlamaModel.forward. ``attentions``: one per layer, of the ordinary pass (the last one of a block loop).

        A loop's would be of other heads, so that layer and head numbers no longer meant what they do in a decoder.
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
        check_runtime(past_key_values, config, kwargs)
        cache_position = kwargs.pop("cache_position", None)
        if cache_position is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            cache_position = torch.arange(x.shape[1], device=x.device) + seen
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        mask = causal_mask(config, x, attention_mask, cache_position, past_key_values, position_ids)
        kwargs |= {
            "attention_mask": mask,
            "position_embeddings": self.rotary_emb(x, position_ids),
            "position_ids": position_ids,
            "cache_position": cache_position,
            "past_key_values": past_key_values,
            "output_attentions": attentions_too,
        }
        states, attentions = [x], []
        for layer in self.layers[: config.num_hidden_layers]:  # fewer while a draft of it exits early
            x = layer(x, **kwargs)
            if attentions_too:
                x, weights = x
                attentions.append(weights)
            states.append(x)
        states[-1] = x = self.norm(x)
        outputs = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=chosen_states(states, states_too) if states_too else None,
            attentions=tuple(w for w in attentions if w is not None) if attentions_too else None,
        )
        return outputs if wants_dict(return_dict, config) else outputs.to_tuple()


class SGTForCausalLM(SGTPreTrainedModel, SGTGenerationMixin):
    """The language model."""

    decoder_class: type[nn.Module] = SGTModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (as in transformers)

    def __init__(self, config: SGTConfig) -> None:
        super().__init__(config)
        self.model = self.decoder_class(config)
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
        output_hidden_states: bool | int | list[int] | None = None,
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
        return result if wants_dict(return_dict, self.config) else result.to_tuple()


# What follows stands in this file, and not in one of its own, because transformers saves with a model only the files
# that its class needs: a folder saved after training with AutoModelForCausalLM must still know these classes.


class SGTForSequenceClassification(GenericForSequenceClassification, SGTPreTrainedModel):
    """One answer per sequence, from its last token that is no padding."""

    def __init__(self, config: SGTConfig) -> None:
        PreTrainedModel.__init__(self, config)  # the generic one looks for the decoder's class in a registry
        self.num_labels = config.num_labels
        self.model = SGTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class SGTForTokenClassification(GenericForTokenClassification, SGTPreTrainedModel):
    """One answer per token."""

    def __init__(self, config: SGTConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = SGTModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class SGTForQuestionAnswering(GenericForQuestionAnswering, SGTPreTrainedModel):
    """Where in the text an answer begins and ends."""

    def __init__(self, config: SGTConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = SGTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "SGTForCausalLM",
    "SGTForQuestionAnswering",
    "SGTForSequenceClassification",
    "SGTForTokenClassification",
    "SGTModel",
    "SGTPreTrainedModel",
]
