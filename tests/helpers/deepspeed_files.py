"""Checkpoints in DeepSpeed's file format, made without DeepSpeed's engine, for any layout and any numbers.

What is written here is what DeepSpeed 0.19.8 writes as far as the readers look at it;
tests/integration/test_reshard.py reads what it writes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sgt.arch.weights import stage_weights, weights
from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, MOMENTS, QUANTITIES, WEIGHTS
from megatron_sgt.checkpoint.reshard.stage0 import PARAMETER_NAMES
from megatron_sgt.config import Config
from megatron_sgt.config.pipeline import PipelineLayout
from megatron_sgt.files import replace_text
from megatron_sgt.model.hf_weights import hf_weights, megatron_shard
from tests.helpers.single import small_config

State = dict[str, dict[str, Tensor]]
"""Quantity -> name -> tensor."""

STEP = 7


def odd_config(sections: dict[str, dict[str, Any]] | None = None, **model: Any) -> Config:
    """A model whose parameters few data-parallel sizes divide, with a padded vocabulary.

    sections: values of other sections.
    """
    shape = {
        "num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 4,
        "ffn_hidden_size": 20, "vocab_size": 21, "make_vocab_size_divisible_by": 4, "qk_layernorm": True,
    }  # fmt: skip
    return small_config(**{"growth": {"method": "vanilla"}, **(sections or {}), "model": {**shape, **model}})


def random_state(config: Config, seed: int = 0, averaged: bool = False) -> State:
    """Whole tensors under Hugging Face names, the vocabulary with its padding rows; ``averaged``: an AVERAGE, too."""
    model = config.model
    whole = model.model_copy(update={"vocab_size": model.padded_vocab_size()})
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for quantity in (*QUANTITIES, *([AVERAGE] if averaged else [])):
        fused = {}
        for weight in weights(whole):
            fused[weight.megatron] = torch.randn(weight.shard_shape(1), generator=generator)
        state[quantity] = hf_weights([fused], whole)
    return state


def rank_state(config: Config, state: State, tp_size: int = 1, tp_rank: int = 0) -> State:
    """One tensor-parallel rank's shards of ``state``, under the names of the model that is trained."""
    return {
        quantity: {f"gpt.{n}": t for n, t in megatron_shard(whole, config.model, tp_size, tp_rank).items()}
        for quantity, whole in state.items()
    }


def groups_of(names: Sequence[str], state: State, weight_decay_on: str) -> list[list[str]]:
    """Names by parameter group."""
    if weight_decay_on == "all":
        return [list(names)]
    return [[name for name in names if (state[WEIGHTS][name].dim() >= 2) is matrix] for matrix in (True, False)]


def no_average(dp_rank: int) -> Path:
    raise AssertionError("a state with an average needs a file for it")


def _write_average(path: Path, tensors: list[Tensor]) -> None:
    torch.save({"average": tensors}, path)


def write_stage0(
    path: Path,
    state: State,
    groups: Sequence[Sequence[str]],
    step: int = STEP,
    average_file: Callable[[int], Path] = no_average,
) -> None:
    """mp_rank_XX_model_states.pt of an unsharded run."""
    names = [name for group in groups for name in group]
    states = {
        index: {"step": torch.tensor(float(step)), **{m: state[m][name] for m in MOMENTS}}
        for index, name in enumerate(names)
    }
    content = {"module": state[WEIGHTS], "optimizer": {"state": states}, PARAMETER_NAMES: names}
    torch.save(content, path)
    if AVERAGE in state:
        _write_average(average_file(0), [state[AVERAGE][name] for name in names])


def write_stage12(
    model_file: Path,
    optimizer_file: Callable[[int], Path],
    state: State,
    groups: Sequence[Sequence[str]],
    dp_size: int,
    *,
    aligned: int = 1,
    change: Callable[[dict[str, Any]], None] = lambda content: None,
    average_file: Callable[[int], Path] = no_average,
) -> None:
    """Model and optimizer files of ZeRO 1 or 2.

    aligned: elements that every parameter is padded to. change: applied to every optimizer state.
    """
    shapes = [{name: state[WEIGHTS][name].shape for name in group} for group in groups]
    torch.save({"param_shapes": shapes}, model_file)
    paddings = [
        [-state[WEIGHTS][name].numel() % aligned if name != group[-1] else 0 for name in group] for group in groups
    ]
    flat = {
        q: [_flat(values, g, p, 2 * dp_size) for g, p in zip(groups, paddings, strict=True)]
        for q, values in state.items()
    }
    lean = [sum(state[WEIGHTS][n].numel() for n in g) + sum(p) for g, p in zip(groups, paddings, strict=True)]
    for rank in range(dp_size):
        parts = {q: [whole.chunk(dp_size)[rank].clone() for whole in wholes] for q, wholes in flat.items()}
        weights = [part[: max(0, size - rank * part.numel())] for part, size in zip(parts[WEIGHTS], lean, strict=True)]
        states = {
            index: {"step": torch.tensor(float(STEP)), **{m: parts[m][index] for m in MOMENTS}}
            for index in range(len(groups))
        }
        content = {
            "single_partition_of_fp32_groups": weights,
            "base_optimizer_state": {"state": states, "param_groups": [{} for _ in groups]},
            "param_alignment_paddings": paddings,
            "dynamic_loss_scale": False,
        }
        change(content)
        torch.save({"optimizer_state_dict": content}, optimizer_file(rank))
        if AVERAGE in state:
            _write_average(average_file(rank), parts[AVERAGE])


def _flat(values: Mapping[str, Tensor], names: Sequence[str], paddings: Sequence[int], unit: int) -> Tensor:
    pieces = [p for name, pad in zip(names, paddings, strict=True) for p in (values[name].flatten(), torch.zeros(pad))]
    total = sum(piece.numel() for piece in pieces)
    return torch.cat([*pieces, torch.zeros(-total % unit)])


def write_stage3(
    model_file: Path,
    optimizer_file: Callable[[int], Path],
    state: State,
    groups: Sequence[Sequence[str]],
    dp_size: int,
    change: Callable[[dict[str, Any]], None] = lambda content: None,
    average_file: Callable[[int], Path] = no_average,
) -> None:
    """Model and optimizer files of ZeRO 3. groups: the names of each sub-group."""
    shapes = [{name: state[WEIGHTS][name].shape for name in group} for group in groups]
    torch.save({"param_shapes": shapes}, model_file)
    for rank in range(dp_size):

        def part(tensor: Tensor, rank: int = rank) -> Tensor:
            size = -(-tensor.numel() // dp_size)
            return torch.cat([tensor.flatten(), torch.full((size * dp_size,), 9.0)])[rank * size : (rank + 1) * size]

        flat = {q: [torch.cat([part(values[n]) for n in group]) for group in groups] for q, values in state.items()}
        states = {
            index: {"step": torch.tensor(float(STEP)), **{m: flat[m][index] for m in MOMENTS}}
            for index in range(len(groups))
        }
        content = {
            "fp32_flat_groups": [torch.nn.Parameter(flat_group) for flat_group in flat[WEIGHTS]],
            "optimizer_state_dict": {"state": states, "param_groups": [{} for _ in groups]},
            "dynamic_loss_scale": False,
        }
        change(content)
        torch.save({"optimizer_state_dict": content}, optimizer_file(rank))
        if AVERAGE in state:
            _write_average(average_file(rank), flat[AVERAGE])


def stage_state(config: Config, state: State, pipeline: PipelineLayout, stage: int) -> State:
    """Those of one rank's shards that ``stage`` of a pipeline holds."""
    held = [f"gpt.{weight.megatron}" for weight in stage_weights(config.model, pipeline, stage)]
    return {quantity: {name: tensors[name] for name in held} for quantity, tensors in state.items()}


def write_checkpoint(
    root: Path,
    config: Config,
    state: State,
    layout_: tuple[int, int, int],
    weight_decay_on: str = "all",
    pipeline: tuple[int, tuple[int, ...]] | None = None,
    step: int = STEP,
) -> Path:
    """A committed checkpoint of ``state`` at (tensor parallel, data parallel, ZeRO stage); returns its folder.

    pipeline: its stages, and the layers of every chunk.
    """
    tp_size, dp_size, stage = layout_
    where: dict[str, Any] = {
        "tensor_model_parallel_size": tp_size, "data_parallel_size": dp_size, "zero_stage": stage,
    }  # fmt: skip
    stages = PipelineLayout(*(pipeline or (1, (config.model.num_layers,))))
    if pipeline is not None:
        where |= {layout.PIPELINE_SIZE: stages.size, layout.PIPELINE_COUNTS: list(stages.counts)}
    folder = root / layout.tag_for(step)
    folder.mkdir(parents=True)
    for mp_rank in range(tp_size * stages.size):
        pp_rank, tp_rank = divmod(mp_rank, tp_size)
        shards = stage_state(config, rank_state(config, state, tp_size, tp_rank), stages, pp_rank)
        groups = groups_of(list(shards[WEIGHTS]), shards, weight_decay_on)
        model = folder / layout.files_of_rank(where, mp_rank, 0)[0]

        def optimizer_file(dp_rank: int, mp_rank: int = mp_rank) -> Path:
            return folder / layout.files_of_rank(where, mp_rank, dp_rank)[1]

        def average_file(dp_rank: int, mp_rank: int = mp_rank) -> Path:
            return folder / layout.average_file(where, mp_rank, dp_rank)

        if stage == 0:
            write_stage0(model, shards, groups, average_file=average_file)
        elif stage == 3:
            write_stage3(model, optimizer_file, shards, groups, dp_size, average_file=average_file)
        else:
            write_stage12(model, optimizer_file, shards, groups, dp_size, average_file=average_file)
    for rank in range(tp_size * stages.size * dp_size):
        torch.save({}, folder / layout.rng_file(rank))
    averaged = {layout.AVERAGE_STATE: {"decay": 0.75}} if AVERAGE in state else {}
    saved = {"layout": where, "trainer": counters(step), "hooks": {}, **averaged}
    layout.write_json(folder / layout.STATE_FILE, saved)
    (folder / layout.CONFIG_FILE).write_text(config.to_yaml())
    write_manifest(folder)
    replace_text(root / layout.LATEST_FILE, folder.name)
    return folder


def counters(step: int) -> dict[str, int]:
    """Of a run that has skipped no step."""
    return {"step": step, "consumed_samples": 2 * step, "skipped_steps": 0, "consecutive_skipped": 0}


def write_manifest(folder: Path) -> None:
    """Make what lies in ``folder`` count as whole."""
    manifest.write_manifest(folder, {})
