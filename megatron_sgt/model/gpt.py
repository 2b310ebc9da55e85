"""Builds the language model, or this rank's part of it, and wraps it for the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.config import Config
from megatron_sgt.config.pipeline import PipelineLayout
from megatron_sgt.data.document_samples import DOCUMENT_KEYS
from megatron_sgt.data.pieces import cut
from megatron_sgt.errors import ConfigError, DataError
from megatron_sgt.model.apply_plan import begin_step
from megatron_sgt.model.documents import DocumentMask, DocumentRules
from megatron_sgt.model.entropy_meter import EntropyMeter
from megatron_sgt.model.initial_weights import draw_weights
from megatron_sgt.model.loop_backend import loop_backend
from megatron_sgt.model.mcore_config import compiles, transformer_config
from megatron_sgt.model.pipeline_forward import forward_only, from_last_stage, inputs_of
from megatron_sgt.model.pipeline_stage import Pipeline, PipelineStage
from megatron_sgt.model.rotary import scaled_frequencies
from megatron_sgt.model.spec import decoder_spec
from megatron_sgt.model.tied_weight import TiedWeight
from megatron_sgt.ops.attention import newer_flash_attention
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.parallel.rng import seed_for_training
from megatron_sgt.planning.pipeline import pipeline_layout

READ_KEYS = frozenset(("tokens", "labels", "loss_mask", "position_ids", *DOCUMENT_KEYS))
"""What a sample may hold. Anything else, a mask of its own say, would be ignored."""


class LanguageModel(torch.nn.Module):
    """Megatron-Core's GPTModel with the loss of one micro-batch, and the meter of its attention entropies.

    ``gpt``: the whole model, or in a pipeline the weights of this rank's stage under the same names. ``chunks``: what
    is called, the parts that a micro-batch passes on this rank; without a pipeline ``gpt`` itself. ``layout``: which
    layers each stage holds. ``pipeline``: None without one. ``rules``: what becomes of the documents in a sample.
    """

    def __init__(
        self,
        gpt: GPTModel | PipelineStage,
        meter: EntropyMeter,
        pipeline: Pipeline | None = None,
        rules: DocumentRules | None = None,
    ) -> None:
        super().__init__()
        self.gpt = gpt
        self.meter = meter
        self.rules = DocumentRules() if rules is None else rules
        self.pipeline = pipeline
        self.chunks: tuple[GPTModel, ...] = (gpt,) if pipeline is None else pipeline.chunks
        self.layout = PipelineLayout(1, (gpt.config.num_layers,)) if pipeline is None else pipeline.layout

    def forward(
        self,
        tokens: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        chunk: int = 0,
        documents: DocumentMask | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats over the positions whose mask is 1; of a chunk before the last, its output.

        Args:
            tokens, position_ids: [B, S] int64, for the first chunk of the model. labels: [B, S] int64 and
            loss_mask: [B, S] float, for its last one.
            chunk: which of ``chunks``; the input of one that is not the model's first has been set on it.
            documents: of all chunks; None: every token sees all before it, at its position in the sequence.
            weight: a scalar, of this micro-batch in the mean over a step's (see ``engine.token_weights``).
        """
        output = self.chunks[chunk](tokens, position_ids, documents, labels=labels)
        if loss_mask is None:
            return output
        mask = loss_mask.to(output.dtype)
        loss = (output * mask).sum() / mask.sum().clamp(min=1.0)
        return loss if weight is None else loss * weight.to(loss.dtype)

    def inputs(
        self, batch: Mapping[str, Tensor], device: torch.device, chunk: int = 0, pieces: int = 1
    ) -> dict[str, Any]:
        """What ``chunk`` needs of a micro-batch on the host, on ``device``: arguments of ``forward``.

        Args:
            pieces: into which every sample is cut (see ``data.pieces.cut``). Tokens are cut on the device: whole
                samples lie in pinned memory.

        Raises:
            DataError: the samples hold something that nothing would read; see ``DocumentRules.mask_of``.
        """
        if unread := sorted(batch.keys() - READ_KEYS):
            raise DataError(
                f"the samples of data.dataset {self.rules.dataset} have {unread[0]}, which nothing reads; make them "
                f"without it, of {', '.join(sorted(READ_KEYS))}"
            )
        found: dict[str, Any] = cut(inputs_of(self.chunks[chunk], batch, device), pieces)
        mask = self.rules.mask_of(batch, pieces, device)
        return found if mask is None else {**found, "documents": mask}

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """[B, S] tokens -> [B, S, padded vocabulary] logits, gathered over tensor-parallel ranks, on every stage."""
        begin_step(self)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if self.pipeline is None:
            return self.gpt(tokens, positions, None, runtime_gather_output=True)

        def forward(chunk: int, batch: Mapping[str, Tensor]) -> Tensor:
            gpt = self.chunks[chunk]
            inputs = inputs_of(gpt, batch, tokens.device)
            return gpt(inputs.get("tokens"), inputs.get("position_ids"), None, runtime_gather_output=True)

        found = forward_only(self.pipeline, forward, [{"tokens": tokens, "position_ids": positions}])
        gpt = self.chunks[-1]
        empty = torch.empty(*tokens.shape, gpt.vocab_size, dtype=gpt.config.params_dtype, device=tokens.device)
        return from_last_stage(found[0] if found else empty, self.pipeline.groups)


def build_model(
    config: Config, groups: ParallelGroups, precision: str, num_passes: int, plain: bool = False
) -> LanguageModel:
    """Build the model, or this rank's stage of it, on ``groups.device`` with initial weights from ``train.seed``.

    Args:
        num_passes: attention passes that the entropy meter holds, 1 + ``Schedule.max_loops``.
        plain: Megatron-Core's own layers (see ``decoder_spec``).

    Raises:
        ConfigError: ``train.loop_backend`` asks for what cannot run here; ``plain`` layers know no documents.
    """
    layout, rules = HeadLayout.of(config.model, groups.tp_size, groups.tp_rank), DocumentRules.of(config)
    if plain and rules.told:
        raise ConfigError(
            "Megatron-Core's own layers know no documents; turn data.reset_attention_mask, data.reset_position_ids and "
            "data.packing off, or train with SGT's layers"
        )
    meter = EntropyMeter(config.model.num_layers, num_passes, layout, groups.device, weighted=rules.told)
    fused = loop_backend(config, precision, groups.device)[0] == "triton"
    newer_flash_attention(groups.device)
    # Before the model is built: Megatron-Core enters a random stream for each weight.
    seed_for_training(config.train.seed, groups)
    parts = pipeline_layout(config)
    settings = transformer_config(config, precision, groups.device, plain)
    tied = not config.model.untie_embeddings_and_output_weights
    frequencies, attention_factor = scaled_frequencies(config.model)
    chunks = []
    for number, layers in enumerate(parts.chunks(groups.pp_rank)):
        chunk = GPTModel(
            config=settings,
            transformer_layer_spec=decoder_spec(
                config, meter, layout, plain, fused, compiles(config, groups.device), len(layers), attention_factor
            ),
            vocab_size=config.model.padded_vocab_size(),
            max_sequence_length=config.model.seq_length,
            pre_process=layers.start == 0,
            post_process=layers.stop == parts.num_layers,
            position_embedding_type="rope",
            rotary_base=config.model.rotary_base,
            # Over stages ``TiedWeight`` shares it: Megatron-Core would make a second parameter.
            share_embeddings_and_output_weights=tied and parts.size == 1,
            vp_stage=number if parts.virtual_size > 1 else None,
        )
        if frequencies is not None:
            chunk.rotary_pos_emb.inv_freq = frequencies.to(groups.device)
        _drop_empty_extra_state(chunk)
        chunks.append(chunk.to(groups.device))
    if parts.size == 1:
        model = LanguageModel(chunks[0], meter, rules=rules)
    else:
        pipeline = Pipeline(parts, groups, tuple(chunks), TiedWeight(chunks, groups) if tied else None)
        model = LanguageModel(PipelineStage(chunks, parts, groups.pp_rank), meter, pipeline, rules)
    draw_weights(model.gpt, config, groups)
    return model


def _drop_empty_extra_state(model: torch.nn.Module) -> None:
    """Leave Megatron's ``_extra_state: None`` entries out of state dicts.

    They exist for FP8 modules, which are not used here, and DeepSpeed's universal-checkpoint conversion fails
    on them. Megatron's own load hooks put them back.
    """

    def strip(module: torch.nn.Module, state: dict, prefix: str, metadata: object) -> None:
        for key in [k for k, v in state.items() if k.endswith("_extra_state") and v is None]:
            del state[key]

    for module in model.modules():
        module.register_state_dict_post_hook(strip)
