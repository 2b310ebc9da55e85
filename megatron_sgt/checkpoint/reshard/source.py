"""Opens a checkpoint in DeepSpeed's files as the states of its ranks, stage by stage of its pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_sgt.arch.weight import Weight
from megatron_sgt.arch.weights import stage_of, stage_weights
from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.forms import read_config, read_state
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, QUANTITIES, RankState, common_step
from megatron_sgt.checkpoint.reshard.stage0 import Stage0State
from megatron_sgt.checkpoint.reshard.stage3 import Stage3State
from megatron_sgt.checkpoint.reshard.stage12 import Stage12State
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.config.pipeline import PipelineLayout
from megatron_sgt.errors import CheckpointError
from megatron_sgt.model.hf_weights import join

PREFIX = "gpt."
"""What the model's parameter names have before those of the weight table."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert. The padding rows of ``model``'s vocabulary count as its own, so that none is cut off.

    The padding rows take part in the softmax: without them the loss would jump.

    ``pipeline``: which weights each stage of a pipeline holds. ``ranks``: of every stage, the states of its
    tensor-parallel ranks.
    """

    folder: Path
    model: ModelConfig
    saved: dict[str, Any]
    pipeline: PipelineLayout
    ranks: list[list[RankState]]

    @property
    def tp_size(self) -> int:
        return len(self.ranks[0])

    @property
    def loss_scale(self) -> float | None:
        """fp16's dynamic loss scale, which all ranks share; None where there is none."""
        return self.ranks[0][0].loss_scale

    @property
    def quantities(self) -> tuple[str, ...]:
        """What the checkpoint holds of every parameter."""
        return (*QUANTITIES, AVERAGE) if layout.AVERAGE_STATE in self.saved else QUANTITIES

    @property
    def step(self) -> int:
        """AdamW's step.

        Raises:
            CheckpointError: the ranks differ in it.
        """
        return common_step((rank.step for stage in self.ranks for rank in stage), self.folder)

    def whole(self, weight: Weight, quantity: str) -> tuple[dict[str, Tensor], float]:
        """One parameter's ``quantity`` (of ``quantities``), merged from all tensor-parallel ranks of its stage.

        Returns:
            Its whole fp32 tensors by Hugging Face name, and the largest difference between the ranks' copies
            where it is replicated; rank 0's is taken.
        """
        shards = [rank.read(PREFIX + weight.megatron, quantity) for rank in self.ranks[stage_of(weight, self.pipeline)]]
        drift = 0.0
        if weight.split == "replicated":
            drift = max(float((shard - shards[0]).abs().max()) for shard in shards)
        return join(weight, shards, self.model), drift


def open_source(folder: Path) -> Source:
    """Open the checkpoint ``folder``, whose files were verified before; needs no process group.

    Raises:
        CheckpointError: its files are not what DeepSpeed writes for its layout, or not of its model.
    """
    saved = read_state(folder)
    model = read_config(folder).model
    written_under = saved["layout"]
    if written_under is None:
        raise CheckpointError(f"{folder} is layout-free already: it loads under any layout as it is")
    try:
        pipeline = layout.pipeline_of(written_under, model.num_layers)
        tp_size = written_under["tensor_model_parallel_size"]
        averaged = layout.AVERAGE_STATE in saved
        ranks = [
            [_open_rank(folder, written_under, stage * tp_size + rank, averaged) for rank in range(tp_size)]
            for stage in range(pipeline.size)
        ]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} cannot be resharded: DeepSpeed's files lack something that version 0.19 writes "
            f"({type(error).__name__}: {error})"
        ) from error
    for stage, held in enumerate(ranks):
        wanted = {
            (PREFIX + weight.megatron, weight.shard_shape(tp_size)) for weight in stage_weights(model, pipeline, stage)
        }
        for rank in held:
            if differing := wanted ^ set(rank.shapes.items()):
                names = sorted({name for name, _ in differing})
                where = f" in stage {stage} of the pipeline" if pipeline.size > 1 else ""
                raise CheckpointError(
                    f"{folder} cannot be resharded: unexpected parameters or shapes{where}: {names[:4]}"
                )
    padded = model.model_copy(update={"vocab_size": model.padded_vocab_size()})
    return Source(folder, padded, saved, pipeline, ranks)


def _open_rank(folder: Path, where: dict[str, Any], mp_rank: int, averaged: bool) -> RankState:
    ranks = range(where["data_parallel_size"])
    files = [[folder / name for name in layout.files_of_rank(where, mp_rank, dp_rank)] for dp_rank in ranks]
    averages = [folder / layout.average_file(where, mp_rank, dp_rank) for dp_rank in ranks] if averaged else []
    if where["zero_stage"] == 0:
        return Stage0State(files[0][0], averages)
    kind = Stage3State if where["zero_stage"] == 3 else Stage12State
    return kind(files[0][0], [optimizer for _, optimizer in files], averages)
