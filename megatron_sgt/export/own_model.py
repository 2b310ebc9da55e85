"""The project's own model with a checkpoint's weights, in a single process, to compare an export with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_sgt.arch.weight import Weight
from megatron_sgt.compat.megatron_cpu import prepare_megatron
from megatron_sgt.config import Config
from megatron_sgt.config.parallel import ParallelConfig
from megatron_sgt.config.run import TrainConfig
from megatron_sgt.export.source import ExportSource
from megatron_sgt.growth import LoopPlan
from megatron_sgt.launch.rank_info import LOOPBACK, RankInfo, free_port
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.model.gpt import LanguageModel, build_model
from megatron_sgt.model.hf_weights import shard
from megatron_sgt.parallel.groups import ParallelGroups, initialize_groups


def alone() -> ParallelGroups:
    """A process group of this process alone, on the CPU, whatever launcher has started it."""
    device = torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a GPU may be present, but the CPU is wanted here
        prepare_megatron(device)
    info = RankInfo(0, 1, 0, 1, LOOPBACK, free_port(), "single")
    return initialize_groups(ParallelConfig(device="cpu"), info, device)


def without_layout(config: Config) -> Config:
    """``config`` for one process that does not train."""
    train = TrainConfig(train_iters=1, micro_batch_size=1, global_batch_size=1, precision="fp32")
    return config.model_copy(update={"parallel": ParallelConfig(device="cpu"), "train": train})


def empty_model(config: Config) -> LanguageModel:
    """``config``'s model in fp32 and in evaluation mode; its weights are still those of initialisation."""
    return build_model(without_layout(config), alone(), "fp32", num_passes=1).eval()


def load_weight(
    model: LanguageModel,
    weight: Weight,
    tensors: Mapping[str, Tensor],
    config: Config,
    name: str | None = None,
) -> None:
    """Copy one parameter's whole tensors into ``model``, as the parameter ``name`` (default: the weight's)."""
    whole = shard(weight, [tensors[n] for n in weight.hf], config.model)
    with torch.no_grad():
        model.gpt.get_parameter(name or weight.megatron).copy_(whole)


def own_model(source: ExportSource, plan: LoopPlan, stored: torch.dtype) -> LanguageModel:
    """The checkpoint's model executing ``plan``, in fp32, its weights rounded to ``stored`` as in the export."""
    model = empty_model(source.config)
    for weight in source.weights():
        tensors, _ = source.read(weight)
        load_weight(model, weight, {n: t.to(stored).float() for n, t in tensors.items()}, source.config)
    apply_plan(model, plan)
    return model
