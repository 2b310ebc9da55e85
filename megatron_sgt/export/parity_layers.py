"""Parity for the largest models: both models go through the same tokens with one layer at a time in memory.

The hidden states of each side pass on to its own next layer, so the logits at the end are those of the whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sgt.arch.weight import Weight
from megatron_sgt.export.hf.loading import one_layer_models, quiet
from megatron_sgt.export.hf_tensors import HFTensors
from megatron_sgt.export.own_model import empty_model, load_weight
from megatron_sgt.export.parity import (
    LOSS,
    Check,
    Parity,
    largest_gap,
    logit_tolerance,
    loss_of,
    probe_tokens,
    rotary_checks,
    through_cache,
)
from megatron_sgt.export.source import ExportSource
from megatron_sgt.export.to_hf import Export
from megatron_sgt.growth import LoopPlan
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.model.mcore_config import DTYPES

LENGTH = 128


class _Layers:
    """The project's side: one layer of Megatron-Core, its weights exchanged from layer to layer."""

    def __init__(self, source: ExportSource, stored: torch.dtype) -> None:
        self.source, self.stored = source, stored
        update = {"num_layers": 1, "vocab_size": 8, "make_vocab_size_divisible_by": 8}
        self.config = source.config.model_copy(update={"model": source.config.model.model_copy(update=update)})
        self.model = empty_model(self.config)

    def read(self, weight: Weight) -> dict[str, Tensor]:
        return {name: t.to(self.stored).float() for name, t in self.source.read(weight)[0].items()}

    def load(self, megatron_prefix: str, own_prefix: str) -> None:
        for weight in self.source.weights():
            if weight.megatron.startswith(megatron_prefix):
                name = own_prefix + weight.megatron.removeprefix(megatron_prefix)
                load_weight(self.model, weight, self.read(weight), self.source.config, name)

    def forward(self, layer: int, plan: LoopPlan, x: Tensor) -> Tensor:
        """Layer ``layer`` of ``plan`` on x [B, S, D]."""
        self.load(f"decoder.layers.{layer}.", "decoder.layers.0.")
        apply_plan(self.model, LoopPlan(1, ((0, plan[layer]),)))
        gpt = self.model.chunks[0]
        rotary = gpt.rotary_pos_emb(x.shape[1])
        out, _ = gpt.decoder.layers[0](x.transpose(0, 1), attention_mask=None, rotary_pos_emb=rotary)
        return out.transpose(0, 1)

    def vocabulary(self, first: bool) -> Tensor:
        found = [weight for weight in self.source.weights() if weight.split == "vocab"]
        return next(iter(self.read(found[0 if first else -1]).values()))

    def final_norm(self, x: Tensor) -> Tensor:
        self.load("decoder.final_layernorm.", "decoder.final_layernorm.")
        return self.model.chunks[0].decoder.final_layernorm(x)


@torch.no_grad()
@quiet()
def check_parity_by_layers(export: Export) -> Parity:
    """As ``check_parity``, in the memory of a few layers; the greedy continuation is left out.

    The cache is checked in each layer, on the exported side's own hidden states.
    """
    trust = export.form is not None
    tokens = probe_tokens(export, length=LENGTH)
    own = _Layers(export.source, DTYPES[export.options.dtype])
    exported = HFTensors(export.folder)
    checks = tuple(_walk(export, own, exported, one_layer_models(export.folder, trust), tokens))
    text = f"{tokens.shape[0]} sequences of {tokens.shape[1]} random tokens, layer by layer"
    return Parity("layers", checks, text)


def _walk(
    export: Export,
    own: _Layers,
    exported: HFTensors,
    build: Callable[[int], Any],
    tokens: Tensor,
) -> Iterator[Check]:
    embedding = "model.embed_tokens.weight"
    mine = F.embedding(tokens, own.vocabulary(first=True))
    theirs = F.embedding(tokens, _read(exported, embedding))
    cache_gap, norm = 0.0, None
    for layer in range(export.source.config.model.num_layers):
        model = build(layer)
        body, norm = model.model, model.model.norm
        body.norm = torch.nn.Identity()
        body.layers[0].load_state_dict(_below(exported, f"model.layers.{layer}."))
        mine = own.forward(layer, export.plan, mine)
        whole = body(inputs_embeds=theirs, use_cache=False).last_hidden_state
        gap = largest_gap(_through_cache(body, theirs), whole) / max(1.0, float(whole.abs().max()))
        cache_gap = gap if not cache_gap >= gap else cache_gap  # keeps NaN
        theirs = whole
    assert norm is not None
    norm.load_state_dict(_below(exported, "model.norm."))
    tied = not export.source.config.model.untie_embeddings_and_output_weights
    expected = F.linear(own.final_norm(mine), own.vocabulary(first=False))
    found = F.linear(norm(theirs), _read(exported, embedding if tied else "lm_head.weight"))
    yield Check("logits, largest difference", largest_gap(found, expected), logit_tolerance(expected))
    yield Check("loss, difference", abs(loss_of(found, tokens) - loss_of(expected, tokens)), LOSS)
    yield from rotary_checks(own.model, body, export)
    yield Check("hidden states of each layer, cached against uncached", cache_gap, 1e-5)


def _read(exported: HFTensors, name: str) -> Tensor:
    return exported.read(name).float()


def _below(exported: HFTensors, prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): _read(exported, n) for n in exported.shapes if n.startswith(prefix)}


def _through_cache(body: Any, x: Tensor) -> Tensor:
    """A decoder's output on x [B, S, D], in chunks through its cache."""

    def chunk(part: Tensor, cache: Any) -> tuple[Tensor, Any]:
        out = body(inputs_embeds=part, past_key_values=cache, use_cache=True)
        return out.last_hidden_state, out.past_key_values

    return through_cache(chunk, x)
