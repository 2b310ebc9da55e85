"""What one layer, and the output layer, cost one rank for one micro-batch, in operations that the step needs. Pure.

The time of a step (``step_time``) and the cut of a pipeline (``pipeline``) are sums of these. Of matrix products and
attention alone, forward and backward, on one tensor-parallel rank (``arch.flops``: 2mkn for a product, causal attention
as a full one; the causal mask hides half of it, and the backward pass computes the scores again):

    needed                 3 · linear + 3.5 · attention / 2
    selective recompute    + attention / 2
    full recompute         + linear + attention / 2, of attention and MLP
    block loop             the same again, per loop
    loop in a window       needed (and full recompute) of the attention alone, per loop
    sparse loop            ``loop_cost.LoopFlops.needed`` of the kept heads on that rank, per loop
    output layer           3 · 2 · tokens · hidden_size · padded vocabulary / ranks
    embedding              none: it is a look-up

With the attended pairs of the data, attention is that of documents of their lengths. Where a pipeline is cut does not
depend on the data: it is cut as if every sequence were one document.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from megatron_sgt.arch.attended_pairs import AttendedPairs
from megatron_sgt.arch.flops import Flops
from megatron_sgt.config import Config
from megatron_sgt.config.base import Section
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.planning.flops import pass_flops
from megatron_sgt.planning.loop_cost import loop_flops
from megatron_sgt.planning.tensor_traffic import LoopMethod


@dataclass(frozen=True)
class LayerCost:
    """Operations of one layer for one micro-batch on one rank: of its ordinary execution, and of its loops."""

    ordinary: float
    loops: float

    @property
    def total(self) -> float:
        return self.ordinary + self.loops


def layer_cost(
    config: Config,
    index: int,
    layer: LayerPlan,
    method: LoopMethod,
    tp_rank: int = 0,
    pairs: AttendedPairs | None = None,
) -> LayerCost:
    """Layer ``index``, executed as ``layer`` says, on tensor-parallel rank ``tp_rank``."""
    train, ranks = config.train, config.parallel.tensor_model_parallel_size
    full = index in config.recomputed_layers("full")
    one = pass_flops(config.model, index, train.micro_batch_size, pairs=pairs)
    whole, attention = one.attention + one.mlp, one.attention
    once = _needed(whole)
    if index in config.recomputed_layers("selective"):
        once += attention.attention / 2
    once += full * _forward(whole)
    loops = layer.block_loops * (_needed(whole) + full * _forward(whole)) / ranks
    if layer.phase == "window":
        loops += layer.loops * (_needed(attention) + full * _forward(attention)) / ranks
    elif layer.phase == "sparse":
        flops = loop_flops(config, method, layer.kept_heads, tp_rank, pairs)
        loops += layer.loops * (flops.needed + full * (flops.linear_forward + flops.visible * flops.attention_forward))
    return LayerCost(0.0 if layer.skipped else once / ranks, loops)


def layer_costs(
    config: Config, plan: LoopPlan, method: LoopMethod, tp_rank: int = 0, pairs: AttendedPairs | None = None
) -> tuple[LayerCost, ...]:
    """All layers of ``plan``."""
    return _layer_costs(_Sections.of(config), plan, method, tp_rank, pairs)


def layer_operations(config: Config, plan: LoopPlan, method: LoopMethod) -> tuple[int, ...]:
    """All layers of ``plan`` in whole operations, on the tensor-parallel rank that has most."""
    return _layer_operations(_Sections.of(config), plan, method)


@dataclass(frozen=True)
class _Sections:
    """A configuration by what the cost of a layer depends on: costs are remembered, as a plan asks for them often."""

    sections: tuple[Section, ...]
    config: Config = field(compare=False)

    @classmethod
    def of(cls, config: Config) -> _Sections:
        return cls((config.model, config.parallel, config.train), config)


@lru_cache(maxsize=256)
def _layer_costs(
    key: _Sections, plan: LoopPlan, method: LoopMethod, tp_rank: int, pairs: AttendedPairs | None
) -> tuple[LayerCost, ...]:
    return tuple(layer_cost(key.config, index, layer, method, tp_rank, pairs) for index, layer in enumerate(plan))


@lru_cache(maxsize=256)
def _layer_operations(key: _Sections, plan: LoopPlan, method: LoopMethod) -> tuple[int, ...]:
    ranks = key.config.parallel.tensor_model_parallel_size if plan.layers else 1
    every = (_layer_costs(key, plan, method, rank, None) for rank in range(ranks))
    return max((tuple(round(layer.total) for layer in layers) for layers in every), key=sum)


def output_cost(config: Config) -> float:
    """Operations of the output layer for one micro-batch on one rank."""
    model, tokens = config.model, config.train.micro_batch_size * config.model.seq_length
    return 3 * 2 * tokens * model.hidden_size * model.padded_vocab_size() / config.parallel.tensor_model_parallel_size


def _needed(flops: Flops) -> float:
    return 3 * flops.linear + 3.5 * flops.attention / 2


def _forward(flops: Flops) -> float:
    return flops.linear + flops.attention / 2
