"""This rank's share of a pipelined model: its chunks, and their weights under the names of the whole model.

Every chunk is a GPTModel of its own, which counts its layers from 0 and which Megatron-Core's schedules call. Engine,
optimizer, checkpoints and exports see ``PipelineStage`` instead: the same modules under the names that they have in a
model of one piece, so that the union over the stages is the table of ``arch.weights``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel

from megatron_sgt.config.pipeline import PipelineLayout
from megatron_sgt.model.tied_weight import TiedWeight
from megatron_sgt.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class Pipeline:
    """What a stage needs besides its weights.

    ``chunks``: of this rank, shallow to deep. ``tied``: the weight that embedding and output layer share, if they do.
    """

    layout: PipelineLayout
    groups: ParallelGroups
    chunks: tuple[GPTModel, ...]
    tied: TiedWeight | None


class PipelineStage(torch.nn.Module):
    """The weights of ``chunks``, the chunks of stage ``stage`` of ``layout``, under global names; never called."""

    def __init__(self, chunks: Sequence[GPTModel], layout: PipelineLayout, stage: int) -> None:
        super().__init__()
        self.config = chunks[0].config
        # A tuple registers nothing: the chunks know their layers under other names.
        self.chunks = tuple(chunks)
        first, last = chunks[0], chunks[-1]
        if first.pre_process:
            self.embedding = first.embedding
        layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleDict(
            {str(number): layer for number, layer in zip(layout.layers(stage), layers, strict=True)}
        )
        if last.post_process:
            self.decoder.final_layernorm = last.decoder.final_layernorm
            self.output_layer = last.output_layer

    def train(self, mode: bool = True) -> PipelineStage:
        """Set the mode of the chunks too, whose own modules are not registered here."""
        super().train(mode)
        for chunk in self.chunks:
            chunk.train(mode)
        return self
