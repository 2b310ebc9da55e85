"""How a pipeline cuts the model, and what the cut costs. Pure.

The cost of a layer is the operations that a step needs of it on one rank for one micro-batch: forward, backward and
recompute, with half of the causal products, and its loops (``layer_cost`` has the formula). The output layer costs the
same operations of its product with the vocabulary; the embedding, a look-up, none. Costs are rounded to whole
operations, so that the cut is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sgt.config import Config
from megatron_sgt.config.pipeline import AUTO, PipelineLayout, even_layout, parse_layout
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.interleaved import interleaved_time
from megatron_sgt.planning.layer_cost import layer_operations, output_cost
from megatron_sgt.planning.loop_cost import choose_loop_method
from megatron_sgt.planning.pipeline_cut import best_cut, chunk_costs
from megatron_sgt.planning.structure import final_plan


def pipeline_layout(config: Config) -> PipelineLayout:
    """Which layers each stage of a run of ``config`` holds: one stage with all of them without a pipeline.

    ``auto`` is the cut with which the structure that the configuration ends with (``expected_plan``) takes the
    shortest step; of equal ones the better one before growth (``pipeline_cut.best_cut``). Windows are short, and
    ignored.

    Raises:
        ConfigError: the schedule refuses the configuration.
        ValueError: a layout that does not add up.
    """
    parallel, num_layers = config.parallel, config.model.num_layers
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    setting = parallel.pipeline_model_parallel_layout
    if stages == 1:
        return PipelineLayout(1, (num_layers,))
    if setting != AUTO:
        return parse_layout(setting, stages, virtual, num_layers)
    grown, output = _operations(config, expected_plan(config)), round(output_cost(config))
    now = _operations(config, LoopPlan.empty(num_layers))
    return PipelineLayout(stages, best_cut(grown, output, now, stages, virtual))


def expected_plan(config: Config) -> LoopPlan:
    """The structure that the cut is made for: the final one, with kept heads together or apart, whatever costs more."""
    return max(
        (final_plan(config, together) for together in (False, True)), key=lambda plan: sum(_operations(config, plan))
    )


def _operations(config: Config, plan: LoopPlan) -> tuple[int, ...]:
    return layer_operations(config, plan, choose_loop_method(config)[0])


@dataclass(frozen=True)
class CutCost:
    """What a structure costs in a cut.

    ``chunks``: operations of every chunk for one micro-batch, in the order of the model; ``size``: stages.
    """

    chunks: tuple[int, ...]
    size: int

    @property
    def stages(self) -> list[int]:
        """Operations of every stage."""
        return [sum(self.chunks[stage :: self.size]) for stage in range(self.size)]

    @property
    def imbalance(self) -> float:
        """The largest stage over their mean, minus 1."""
        return max(self.stages) * len(self.stages) / sum(self.stages) - 1

    def step(self, micro_batches: int) -> float:
        """Operations that a step of ``micro_batches`` takes one after another; see ``pipeline_time``."""
        return pipeline_time(self.chunks, self.size, micro_batches)

    def loss(self, micro_batches: int) -> float:
        """What the step takes more than with chunks of equal cost, as a share of that."""
        mean = sum(self.chunks) / len(self.chunks)
        return self.step(micro_batches) / pipeline_time([mean] * len(self.chunks), self.size, micro_batches) - 1


def cut_cost(config: Config, plan: LoopPlan, layout: PipelineLayout) -> CutCost:
    """The cost of ``plan`` in ``layout``."""
    chunks = chunk_costs(_operations(config, plan), round(output_cost(config)), layout.counts)
    return CutCost(tuple(chunks), layout.size)


def describe_cut(config: Config, world_size: int) -> dict[str, Any] | None:
    """The cut of ``config`` in numbers, JSON-able; None without a pipeline.

    ``imbalance``, ``loss``: see ``CutCost``, ``now`` and in the end (``final``, where the structure changes).
    ``growth``: what the structure adds in the end to the products of a step, as a share. ``even``: the same of the
    even cut.
    ``bubble``: the share of a step in which a stage waits, if all were equal.

    Raises:
        ConfigError: the ranks or the batch do not divide, or the schedule refuses the configuration.
    """
    layout = pipeline_layout(config)
    if layout.size == 1:
        return None
    plans = {"now": LoopPlan.empty(layout.num_layers), "final": expected_plan(config)}
    if plans["now"] == plans["final"]:
        del plans["final"]

    micro_batches = config.num_micro_batches(world_size)

    def about(cut: PipelineLayout) -> dict[str, Any]:
        costs = {name: cut_cost(config, plan, cut) for name, plan in plans.items()}
        steps = [cost.step(micro_batches) for cost in costs.values()]
        return {
            "layout": str(cut),
            "layers": [len(cut.layers(stage)) for stage in range(cut.size)],
            "imbalance": {name: cost.imbalance for name, cost in costs.items()},
            "loss": {name: cost.loss(micro_batches) for name, cost in costs.items()},
            "growth": steps[-1] / steps[0] - 1,
        }

    return {
        **about(layout),
        "chunks": layout.virtual_size,
        "even": about(even_cut(layout)),
        "micro_batches": micro_batches,
        "bubble": bubble(layout.size, layout.virtual_size, micro_batches),
    }


def even_cut(layout: PipelineLayout) -> PipelineLayout:
    """The same number of layers in every chunk, as nearly as it can be."""
    return even_layout(layout.size, layout.virtual_size, layout.num_layers)


def pipeline_time(chunks: Sequence[float], size: int, micro_batches: int) -> float:
    """The time of a step whose chunks take ``chunks`` for one micro-batch, with nothing but waiting for each other.

    With one chunk for each of the ``size`` stages (1F1B) the largest is busy all the time but for filling and draining:
    M · max t_p + Σ t_p - max t_p. With several (interleaved) see ``interleaved_time``.
    """
    if len(chunks) > size:
        return interleaved_time(chunks, size, micro_batches) / 3
    largest = max(chunks)
    return micro_batches * largest + sum(chunks) - largest


def bubble(size: int, virtual_size: int, micro_batches: int) -> float:
    """The share of a step in which a stage waits, if all are equal: (P - 1) / (V · M + P - 1)."""
    return (size - 1) / (virtual_size * micro_batches + size - 1)
