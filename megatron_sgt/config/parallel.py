"""How the model and its state are spread over processes."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_sgt.config.base import MOST_MINUTES, Section
from megatron_sgt.config.pipeline import AUTO, LayoutSetting, read_layout

MOST_RANKS = 1_000_000


class ParallelConfig(Section):
    """Sizes of the parallel groups, under Megatron's names; the rest of the world is data parallel."""

    tensor_model_parallel_size: int = Field(
        default=1, gt=0, le=MOST_RANKS, description="Ranks that share every layer (heads, MLP, vocabulary)."
    )
    pipeline_model_parallel_size: int = Field(
        default=1, gt=0, le=MOST_RANKS, description="Stages of the pipeline: ranks that share the layers by depth."
    )
    virtual_pipeline_model_parallel_size: int = Field(
        default=1,
        gt=0,
        le=MOST_RANKS,
        description="Parts of every stage that take turns (interleaved schedule): a smaller bubble, more messages.",
    )
    pipeline_model_parallel_layout: Annotated[LayoutSetting, BeforeValidator(read_layout)] = Field(
        default=AUTO,
        description="Layers of every stage. auto: the cut that makes the step fastest once growth has ended. "
        "Else Megatron-Core's string (Et*3|tt|tt|tL) or list, or the number of layers of every part (3,2,2,1).",
    )
    context_parallel_size: int = Field(default=1, gt=0, description="Not supported: must be 1.")
    sequence_parallel: bool = Field(
        default=False,
        description="Split norms and dropout along the sequence over the tensor-parallel ranks.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="DeepSpeed ZeRO: 0 nothing is sharded over data-parallel ranks, 1 the optimizer state, "
        "2 also the gradients, 3 also the weights. An fp32 run on one data-parallel rank goes without (stage 0) "
        "unless deepspeed.zero_optimization is set: there is nothing to shard.",
    )
    loop_method: Literal["auto", "owner", "balanced"] = Field(
        default="auto",
        description="How kept heads loop under tensor parallelism: each rank the heads that it owns, or each rank "
        "all kept heads for its share of the tokens; auto: what a cost model finds cheaper.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where to train; auto: on GPUs if there are any (nccl), else on CPUs (gloo).",
    )
    distributed_timeout_minutes: float = Field(
        default=10.0, gt=0, le=MOST_MINUTES, description="A collective that waits longer than this ends the run."
    )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that share one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def model_parallel_sizes(self) -> str:
        """The settings that ``model_parallel_size`` is made of, for messages."""
        tensor, stages = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        if stages == 1:
            return f"parallel.tensor_model_parallel_size: {tensor}"
        return (
            f"parallel: tensor_model_parallel_size {tensor} x pipeline_model_parallel_size {stages} = {tensor * stages}"
        )

    def problems(self) -> Iterator[str]:
        if self.context_parallel_size != 1:
            yield (
                f"context_parallel_size: {self.context_parallel_size} is not supported, only 1; use "
                "tensor_model_parallel_size, zero_stage"
            )
        stages, virtual = self.pipeline_model_parallel_size, self.virtual_pipeline_model_parallel_size
        if virtual > 1 and stages == 1:
            yield f"virtual_pipeline_model_parallel_size: {virtual} needs pipeline_model_parallel_size above 1, got 1"
        if self.zero_stage == 3 and stages > 1:
            yield (
                f"zero_stage: 3 with pipeline_model_parallel_size {stages} would gather every weight twice for each "
                "micro-batch, and DeepSpeed would overwrite gradients; use zero_stage 2 or 1"
            )
