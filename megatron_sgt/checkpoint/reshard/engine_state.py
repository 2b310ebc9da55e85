"""Writes a layout-free checkpoint into a running DeepSpeed engine of any stage.

DeepSpeed's own setters are not enough: at stage 3 they fail on a parameter that the data-parallel size does
not divide, at stages 1 and 2 they use the wrong offsets under ``round_robin_gradients``, and before the first
step there is no AdamW state to set. All stages share a list of flat fp32 tensors that AdamW steps; each stage only
defines which stretch of which parameter lies where in them.

Learning rate, weight decay and AdamW's constants stay those of this run's configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_sgt.arch.weight import Weight
from megatron_sgt.arch.weights import stage_weights
from megatron_sgt.checkpoint.reshard.layout_free import ShardReader
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, MOMENTS, WEIGHTS
from megatron_sgt.checkpoint.reshard.source import PREFIX
from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import CheckpointError
from megatron_sgt.optim.ema import WeightAverage
from megatron_sgt.parallel.collectives import gather_or_raise
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.planning.pipeline import pipeline_layout

if TYPE_CHECKING:
    import deepspeed


@dataclass(frozen=True)
class Stretch:
    """``length`` elements of a flattened parameter from ``source`` on lie in master ``master`` from ``start``."""

    master: int
    start: int
    source: int
    length: int


@dataclass
class Masters:
    """The tensors that AdamW steps on this rank, and which part of each parameter lies in them."""

    tensors: list[Tensor] = field(default_factory=list)
    stretches: dict[str, list[Stretch]] = field(default_factory=dict)

    def add(self, name: str, start: int, source: int, length: int) -> None:
        """Record that a stretch of ``name`` lies in the newest master; ignored for a length below 1."""
        stretches = self.stretches.setdefault(name, [])
        if length > 0:
            stretches.append(Stretch(len(self.tensors) - 1, start, source, length))


def load_into_engine(
    reader: ShardReader,
    step: int,
    loss_scale: float | None,
    config: Config,
    engine: deepspeed.DeepSpeedEngine,
    groups: ParallelGroups,
    average: WeightAverage | None = None,
) -> None:
    """Set fp32 weights, AdamW's moments and ``step``, fp16's ``loss_scale``, and the model's weights; collective.

    A stage of a pipeline reads its own weights alone.

    ``average``: of the weights, set too; from the loaded weights where the reader has none.

    Raises:
        CheckpointError: a tensor is missing, or the optimizer is offloaded to NVMe.
    """
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False):
        raise CheckpointError("a run with optimizer offload to NVMe can load no other layout's checkpoint")
    with masters_changed(engine):
        masters = masters_of(engine, groups)
        held = stage_weights(config.model, pipeline_layout(config), groups.pp_rank)
        _check_names(held, masters)
        values = _prepare_states(optimizer, masters.tensors, step)
        if average is not None and AVERAGE in reader.quantities:
            values[AVERAGE] = average.zeroed()
        # Together: collectives follow, and one rank may read for longer than another.
        gather_or_raise(lambda: _read(reader, config.model, held, masters, values, groups), groups)
        if average is not None and AVERAGE not in values:
            average.start()
        if loss_scale is not None and getattr(optimizer, "dynamic_loss_scale", False):
            optimizer.loss_scaler.cur_scale = loss_scale


@contextmanager
def masters_changed(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Inside, what AdamW steps may be changed; at the end the model computes with it. Collective.

    After an error inside nothing is done: other ranks may not come to the collectives.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    yield
    _refresh_model(optimizer, stage)


def masters_of(engine: deepspeed.DeepSpeedEngine, groups: ParallelGroups) -> Masters:
    """The fp32 tensors that AdamW steps on this rank of any stage, and where each parameter lies in them."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    masters = Masters()
    if stage == 0:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            masters.tensors.append(parameter)
            masters.add(names[id(parameter)], 0, 0, parameter.numel())
    elif stage == 3:
        for master, members in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            masters.tensors.append(master)
            start = 0
            for parameter in members:
                part = parameter.partition_numel()
                first = part * groups.dp_rank
                masters.add(names[id(parameter)], start, first, min(part, parameter.ds_numel - first))
                start += part
    else:
        for master, members in _flat_groups(optimizer):
            masters.tensors.append(master)
            low = master.numel() * groups.dp_rank
            for parameter, offset in members:
                first = max(low, offset)
                end = min(low + master.numel(), offset + parameter.numel())
                masters.add(names[id(parameter)], first - low, first - offset, end - first)
    return masters


def _flat_groups(optimizer: Any) -> Iterable[tuple[Tensor, list[tuple[Tensor, int]]]]:
    """(this rank's part, [(parameter, offset in the whole vector)]) of every group at stage 1 or 2."""
    if not hasattr(optimizer, "round_robin_bit16_groups"):  # DeepSpeed's BF16_Optimizer
        for master, members in zip(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, strict=True):
            offsets = [0]
            for parameter in members:
                offsets.append(offsets[-1] + parameter.numel())
            yield master, list(zip(members, offsets[:-1], strict=True))
        return
    for master, members, offsets in zip(
        optimizer.single_partition_of_fp32_groups,
        optimizer.round_robin_bit16_groups,
        optimizer.round_robin_bit16_offsets,
        strict=True,
    ):
        yield master, list(zip(members, offsets, strict=True))


def _check_names(held: Sequence[Weight], masters: Masters) -> None:
    wanted = {PREFIX + weight.megatron for weight in held}
    if differing := wanted ^ set(masters.stretches):
        raise CheckpointError(f"the model's parameters differ from its weight table: {sorted(differing)[:4]}")


def _prepare_states(optimizer: Any, tensors: list[Tensor], step: int) -> dict[str, list[Tensor]]:
    """Zero every master, give each an AdamW state of its own, and return flat views by quantity.

    States that exist are kept, as DeepSpeed holds views of them; padding is zero as in a run's first step.
    """
    settings = optimizer.param_groups
    on_device = settings[0].get("fused") or settings[0].get("capturable")
    for tensor in tensors:
        tensor.data.zero_()
        state = optimizer.state[tensor]
        for moment in MOMENTS:
            if moment in state:
                state[moment].zero_()
            else:
                state[moment] = torch.zeros_like(tensor.data, memory_format=torch.preserve_format)
        if not _counts_in_group(settings[0]):
            device = tensor.device if on_device else "cpu"
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
    for group in settings:
        if _counts_in_group(group):
            group["step"] = step
    values = {moment: [optimizer.state[t][moment].view(-1) for t in tensors] for moment in MOMENTS}
    return {WEIGHTS: [t.data.view(-1) for t in tensors], **values}


def _read(
    reader: ShardReader,
    model: ModelConfig,
    held: Sequence[Weight],
    masters: Masters,
    values: dict[str, list[Tensor]],
    groups: ParallelGroups,
) -> None:
    for weight in held:
        stretches = masters.stretches[PREFIX + weight.megatron]
        for quantity in [q for q in reader.quantities if q in values] if stretches else ():
            # No name is bound to the shard here: the next one would be read while this one is still in memory.
            _fill(values[quantity], stretches, reader.shard(weight, quantity, model, groups.tp_size, groups.tp_rank))


def _fill(masters: list[Tensor], stretches: list[Stretch], shard: Tensor) -> None:
    flat = shard.view(-1)
    for s in stretches:
        masters[s.master][s.start : s.start + s.length] = flat[s.source : s.source + s.length]


def _counts_in_group(group: dict[str, Any]) -> bool:
    """Whether the optimizer is Apex's FusedAdam, which counts steps per group and not per parameter."""
    return "bias_correction" in group


def _refresh_model(optimizer: Any, stage: int) -> None:
    if stage == 3:
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()
