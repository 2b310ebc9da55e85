"""Builds the language model and wraps it for the engine."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.config import Config
from megatron_sgt.model.apply_plan import begin_step
from megatron_sgt.model.entropy_meter import EntropyMeter
from megatron_sgt.model.initial_weights import draw_weights
from megatron_sgt.model.loop_backend import loop_backend
from megatron_sgt.model.mcore_config import compiles, transformer_config
from megatron_sgt.model.spec import decoder_spec
from megatron_sgt.ops.attention import newer_flash_attention
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.parallel.rng import seed_for_training


class LanguageModel(torch.nn.Module):
    """Megatron-Core's GPTModel with the loss of one micro-batch, and the meter of its attention entropies."""

    def __init__(self, gpt: GPTModel, meter: EntropyMeter) -> None:
        super().__init__()
        self.gpt = gpt
        self.meter = meter

    def forward(self, tokens: Tensor, labels: Tensor, loss_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the positions whose mask is 1.

        Args:
            tokens, labels, position_ids: [B, S] int64. loss_mask: [B, S] float.
        """
        losses = self.gpt(tokens, position_ids, None, labels=labels)
        mask = loss_mask.to(losses.dtype)
        return (losses * mask).sum() / mask.sum().clamp(min=1.0)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """[B, S] tokens -> [B, S, padded vocabulary] logits, gathered over tensor-parallel ranks."""
        begin_step(self)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.gpt(tokens, positions, None, runtime_gather_output=True)


def build_model(
    config: Config, groups: ParallelGroups, precision: str, num_passes: int, plain: bool = False
) -> LanguageModel:
    """Build the model on ``groups.device`` with initial weights from ``train.seed``.

    Args:
        num_passes: attention passes that the entropy meter holds, 1 + ``Schedule.max_loops``.
        plain: Megatron-Core's own layers (see ``decoder_spec``).

    Raises:
        ConfigError: ``train.loop_backend`` asks for what cannot run here.
    """
    layout = HeadLayout.of(config.model, groups.tp_size, groups.tp_rank)
    meter = EntropyMeter(config.model.num_layers, num_passes, layout, groups.device)
    fused = loop_backend(config, precision, groups.device)[0] == "triton"
    newer_flash_attention(groups.device)
    # Before the model is built: Megatron-Core enters a random stream for each weight.
    seed_for_training(config.train.seed, groups)
    gpt = GPTModel(
        config=transformer_config(config, precision, groups.device, plain),
        transformer_layer_spec=decoder_spec(config, meter, layout, plain, fused, compiles(config, groups.device)),
        vocab_size=config.model.padded_vocab_size(),
        max_sequence_length=config.model.seq_length,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
    )
    _drop_empty_extra_state(gpt)
    model = LanguageModel(gpt, meter).to(groups.device)
    draw_weights(gpt, config, groups)
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
