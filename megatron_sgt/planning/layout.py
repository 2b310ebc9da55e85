"""How ranks share a model and a batch, in a line each. No NumPy: a login node prints them too."""

from __future__ import annotations

from megatron_sgt.config import Config
from megatron_sgt.config.base import count


def layout_line(config: Config, world_size: int, precision: str) -> str:
    """How the ranks share the model."""
    parallel = config.parallel
    stage = config.zero_stage_on(world_size, precision)
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    pipeline = f"pipeline parallel {stages}{f' ({chunks} chunks each)' if chunks > 1 else ''} x " if stages > 1 else ""
    return (
        f"{count(world_size, 'rank')} = tensor parallel {parallel.tensor_model_parallel_size} x {pipeline}"
        f"data parallel {config.data_parallel_size(world_size)} · ZeRO-{stage} · {precision}"
    )


def batch_line(config: Config, world_size: int) -> str:
    """The batch arithmetic.

    Raises:
        ConfigError: it does not work out.
    """
    train = config.train
    others = any(span.size != train.global_batch_size for span in config.batches.spans)
    return (
        f"{train.global_batch_size} sequences = micro {train.micro_batch_size} x accumulation "
        f"{config.num_micro_batches(world_size)} x data parallel {config.data_parallel_size(world_size)} · "
        f"{config.tokens_per_step:,} tokens per step{'; others in phases' if others else ''}"
    )
