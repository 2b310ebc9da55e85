"""Names and modes of a stage, from modules that stand for its chunks; tests/engine/test_pipeline.py has real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Linear, Module, ModuleList

from megatron_sgt.config.pipeline import PipelineLayout
from megatron_sgt.model.pipeline_stage import PipelineStage

LAYOUT = PipelineLayout(2, (1, 2, 3, 1))


class Chunk(Module):
    """What a stage sees of a GPTModel."""

    config = "settings"

    def __init__(self, layers: int, first: bool = False, last: bool = False) -> None:
        super().__init__()
        self.pre_process, self.post_process = first, last
        self.decoder = Module()
        self.decoder.layers = ModuleList(Linear(1, 1, bias=False) for _ in range(layers))
        if first:
            self.embedding = Linear(1, 1, bias=False)
        if last:
            self.decoder.final_layernorm, self.output_layer = Linear(1, 1, bias=False), Linear(1, 1, bias=False)


def stages() -> list[tuple[PipelineStage, list[Any]]]:
    chunks: list[list[Any]] = [[Chunk(1, first=True), Chunk(3)], [Chunk(2), Chunk(1, last=True)]]
    return [(PipelineStage(held, LAYOUT, stage), held) for stage, held in enumerate(chunks)]


def test_weights_have_the_names_of_the_whole_model() -> None:
    names = [[name for name, _ in stage.named_parameters()] for stage, _ in stages()]
    layers = "decoder.layers.{}.weight".format
    assert names[0] == ["embedding.weight", *map(layers, (0, 3, 4, 5))]
    assert names[1] == [*map(layers, (1, 2, 6)), "decoder.final_layernorm.weight", "output_layer.weight"]
    for stage, _ in stages():
        assert list(stage.state_dict()) == [name for name, _ in stage.named_parameters()]


def test_a_loaded_weight_is_that_of_its_chunk() -> None:
    stage, chunks = stages()[0]
    state = {name: torch.full((1, 1), float(n)) for n, name in enumerate(stage.state_dict())}
    stage.load_state_dict(state)
    assert [layer.weight.item() for chunk in chunks for layer in chunk.decoder.layers] == [1.0, 2.0, 3.0, 4.0]


def test_modes_reach_the_chunks_own_modules() -> None:
    for stage, chunks in stages():
        for mode in (False, True):
            assert stage.train(mode) is stage
            assert {module.training for chunk in chunks for module in chunk.modules()} == {mode}
