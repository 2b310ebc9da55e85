"""Initial weights: each a function of (seed, name) alone, the same model under every parallel layout.

Megatron-Core draws each rank's share from a stream of that rank, so that the initial model depends on the layout;
with streams that are equal on all ranks, the shares of a matrix would even be equal, and stay so: equal weights
have equal gradients. Here every *whole* tensor is drawn, from a generator of its own, and the rank keeps its share.
One tensor is in memory at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_sgt.arch.weight import Weight
from megatron_sgt.arch.weights import stage_weights
from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.model.hf_weights import shard
from megatron_sgt.model.mcore_config import draws_on_cpu
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.parallel.rng import named_generator
from megatron_sgt.planning.pipeline import pipeline_layout


@torch.no_grad()
def draw_weights(gpt: torch.nn.Module, config: Config, groups: ParallelGroups) -> None:
    """Give this rank's parameters of ``gpt`` their initial values. Parameters on the meta device are left alone.

    Matrices are normal with mean 0 and standard deviation ``init_method_std``, those back into the residual stream
    with that over sqrt(2 · layers) (GPT-2, section 2.3; Megatron's ``scaled_init_method_normal``). They are drawn in
    fp32 and rounded to the parameter's type. Weights of norms are 1, biases 0.
    """
    model, parameters = config.model, dict(gpt.named_parameters())
    where = torch.device("cpu") if draws_on_cpu(config, groups.device) else groups.device
    for weight in stage_weights(model, pipeline_layout(config), groups.pp_rank):
        parameter = parameters.pop(weight.megatron)
        if not parameter.is_meta:
            whole = [initial_value(weight, name, model, config.train.seed, where) for name in weight.hf]
            parameter.copy_(shard(weight, whole, model, groups.tp_size, groups.tp_rank))
    assert not parameters, f"no initial values for {list(parameters)}"


def initial_value(
    weight: Weight, name: str, model: ModelConfig, seed: int, where: torch.device, stage: int = 0
) -> Tensor:
    """The whole initial tensor ``name`` of ``weight``, fp32 on ``where``.

    Args:
        stage: how often the model has grown; the streams of different stages have nothing in common.
    """
    value = torch.empty(weight.whole[name], dtype=torch.float32, device=where)
    if weight.kind in ("norm", "bias"):
        return value.fill_(1.0 if weight.kind == "norm" else 0.0)
    std = model.init_method_std / (math.sqrt(2 * model.num_layers) if weight.kind == "residual" else 1.0)
    stream = f"{name} of stage {stage}" if stage else name
    return value.normal_(0.0, std, generator=named_generator(seed, stream, where))
