"""Puts the parts of a run together: processes, model, optimizer, DeepSpeed engine."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import deepspeed
import torch

from megatron_sgt.arch.weights import stage_weights
from megatron_sgt.compat.deepspeed_cpu import prepare_deepspeed
from megatron_sgt.compat.deepspeed_finite import notice_every_copy
from megatron_sgt.compat.megatron_cpu import prepare_megatron
from megatron_sgt.compat.mpu import DeepSpeedMPU
from megatron_sgt.config import Config
from megatron_sgt.engine.deepspeed_config import deepspeed_config
from megatron_sgt.engine.prepare import prepare_process
from megatron_sgt.errors import ConfigError
from megatron_sgt.launch.environment import RankInfo, to_environ
from megatron_sgt.model.gpt import LanguageModel, build_model
from megatron_sgt.model.hf_weights import megatron_shard
from megatron_sgt.optim.optimizer import build_optimizer
from megatron_sgt.optim.param_groups import parameter_groups
from megatron_sgt.parallel.collectives import gather_or_raise
from megatron_sgt.parallel.device import select_device
from megatron_sgt.parallel.groups import ParallelGroups, initialize_groups
from megatron_sgt.parallel.placement import check_placement
from megatron_sgt.planning.structure import schedule_of


@dataclass(frozen=True)
class Runtime:
    """The parts of a run that every layout has."""

    groups: ParallelGroups
    precision: str
    model: LanguageModel
    engine: deepspeed.DeepSpeedEngine


def start_processes(config: Config, info: RankInfo) -> ParallelGroups:
    """Choose the device, adapt the libraries to it and start the process groups.

    Raises:
        ConfigError: before they start, a device or a precision that this machine lacks, ranks that do not divide;
            after that, on all ranks, one GPU that two of them were given.
    """
    config.data_parallel_size(info.world_size)
    prepare_process(config, info)
    for name, value in to_environ(info).items():
        os.environ.setdefault(name, value)  # DeepSpeed needs LOCAL_RANK, whatever the launcher
    device = select_device(config.parallel.device, info.local_rank, info.local_world_size)
    config.precision_on(device.type)  # refuses what "auto" turns out to be here
    if device.type == "cpu" and config.train.threads_per_rank is not None:
        torch.set_num_threads(config.train.threads_per_rank)
    prepare_megatron(device)
    prepare_deepspeed(device)
    groups = initialize_groups(config.parallel, info, device)
    check_placement(groups)
    check_folders_agree(config, groups)
    return groups


def check_folders_agree(config: Config, groups: ParallelGroups) -> None:
    """Check that all ranks mean the same folders. Collective.

    Raises:
        ConfigError: on every rank, if one reads another, as where a variable of its path differs between nodes.
    """
    folders = {
        "logging.run_dir": os.path.abspath(config.logging.run_dir),
        "checkpoint.save": os.path.abspath(config.save_dir),
        "checkpoint.load": config.checkpoint.load and os.path.abspath(config.checkpoint.load),
    }
    for rank, others in enumerate(gather_or_raise(lambda: folders, groups)):
        for name, folder in folders.items():
            if others[name] != folder:
                low, high = sorted(((groups.rank, folder), (rank, others[name])))
                raise ConfigError(
                    f"{name} is {low[1]} for rank {low[0]}, but {high[1]} for rank {high[0]}: write a path without a "
                    "variable or a folder that differs between them"
                )


def build_runtime(
    config: Config,
    groups: ParallelGroups,
    plain: bool = False,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Runtime:
    """Build model, optimizer and engine on running process groups.

    Args:
        plain: build Megatron-Core's own layers instead of SGT's (see ``model.spec.decoder_spec``).
        weights: whole tensors under Hugging Face names to start from, instead of random weights.

    Raises:
        CheckpointError: ``weights`` does not fit the model.
    """
    precision = config.precision_on(groups.device.type)
    model = build_model(config, groups, precision, 1 + schedule_of(config).max_loops, plain)
    if weights is not None:
        # Before the engine exists: ZeRO copies the weights that it is given.
        held = stage_weights(config.model, model.layout, groups.pp_rank)
        shard = megatron_shard(weights, config.model, groups.tp_size, groups.tp_rank, held)
        model.gpt.load_state_dict(shard, strict=False)
    return Runtime(groups, precision, model, _start_engine(config, groups, model, precision))


def _start_engine(
    config: Config, groups: ParallelGroups, model: LanguageModel, precision: str
) -> deepspeed.DeepSpeedEngine:
    parameters = parameter_groups(model, config.optim)
    optimizer = build_optimizer(parameters, config.optim, groups.device, config.offloads_optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about optional kernels that this project does not use
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, groups.world_size, precision),
            mpu=DeepSpeedMPU(),
            dist_init_required=False,
        )
    if precision == "fp32" and engine.zero_optimization_stage() in (1, 2):
        # In fp32 DeepSpeed looks at the norm alone, which counts replicated parameters on one
        # tensor-parallel rank: another rank's copy of their gradients may be the one that is not finite.
        engine.optimizer.check_grad_overflow = True
    notice_every_copy(engine.optimizer, groups.tp_size, groups.tp_rank)
    return engine
