"""Bytes that live on one rank from step to step, by ZeRO stage: weights, gradients, optimizer state.

State, n elements per rank (its tensor-parallel share of its pipeline stage), dp data-parallel ranks, e bytes an element
of a weight (2 in bf16), g of a summed gradient (4 unless optim.grad_accum_dtype is model), as DeepSpeed keeps it with
AdamW (arXiv 1910.02054), at the stage of ``Config.zero_stage_on``:

    stage      weights              gradients       master copy, moments (fp32)
    0          n·e                  n·g             8n
    1          n·e                  n·g             12n/dp
    2          n·e                  n·g/dp          12n/dp
    3          n·e/dp + gathered    n·g/dp          12n/dp

Buffers: the reduce bucket (stages 1 to 3: 5e8 elements unless deepspeed.zero_optimization says otherwise, twice
with overlap_comm in stages 1 and 2) and its copy in the type that it travels in (optim.grad_reduce_dtype) where it has
another. Stage 1 in bf16 with gradients in fp32 has DeepSpeed's BF16_Optimizer (unless with offload_optimizer): it
reduces the gradients where they are, and has such a copy of all of them, but no bucket. Where stage 1 sums in another
type than e without it, a rank's part of the sum is held beside the sum when it is reduced: n·g/dp. Weights gathered by
stage 3 (at most stage3_max_live_parameters), kept weights of balanced loops, and Megatron's gather buffer of sequence
parallelism.

With offload_optimizer the last column is on the host, under stage 3 the gradients too. With train.ema_decay an average
of the weights lies beside the tensors that AdamW steps: 4n bytes at stage 0, 4n/dp above.

The last stage of a pipeline borrows the embedding where output layer and embedding share it: e bytes an element, and 4
for its gradient, which is summed in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sgt.arch.weight import ELEMENT_BYTES
from megatron_sgt.arch.weights import stage_weights
from megatron_sgt.config import Config
from megatron_sgt.planning.parameters import borrowed_count, stage_parameter_count
from megatron_sgt.planning.pipeline import pipeline_layout

BUCKET_ELEMENTS = 5 * 10**8
LIVE_ELEMENTS = 10**9
"""DeepSpeed's defaults of reduce_bucket_size and stage3_max_live_parameters."""
_FP32 = 4


@dataclass(frozen=True)
class State:
    """Bytes that live from step to step.

    ``gradients``: from backward to update; ``average``: of train.ema_decay; ``borrowed``: another pipeline stage's
    weight and its gradient.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    average: int
    borrowed: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.average + self.borrowed


def state_memory(config: Config, world_size: int, precision: str, pipeline_stage: int = 0) -> State:
    """Bytes of weights, gradients, optimizer state and communication buffers on one rank of a pipeline stage."""
    parallel, element = config.parallel, ELEMENT_BYTES[precision]
    ranks, stage = config.data_parallel_size(world_size), config.zero_stage_on(world_size, precision)
    count = stage_parameter_count(config, pipeline_stage, parallel.tensor_model_parallel_size)
    share = -(-count // ranks)
    zero = config.deepspeed.get("zero_optimization", {})
    gathered = min(count, int(zero.get("stage3_max_live_parameters", LIVE_ELEMENTS))) * element
    stream = config.train.micro_batch_size * config.model.seq_length * config.model.hidden_size * element
    optimizer = 2 * _FP32 * count if stage == 0 else 3 * _FP32 * share
    return State(
        weights=element * (share if stage == 3 else count),
        gradients=_gradients(config, stage, precision, count, share),
        optimizer=0 if config.offloads_optimizer else optimizer,
        buffers=_reduce_buffers(config, stage, precision, count, share)
        + (gathered if stage == 3 else 0)
        + (stream if parallel.sequence_parallel else 0),
        average=0 if config.offloads_optimizer else average_bytes(config, world_size, precision, pipeline_stage),
        borrowed=borrowed_count(config, pipeline_stage) * (element + _FP32),
    )


def average_bytes(config: Config, world_size: int, precision: str, pipeline_stage: int = 0) -> int:
    """Bytes of the average of the weights on one rank, 0 without train.ema_decay; on the host with offload_optimizer.

    Exact: ZeRO 1 and 2 pad each group of parameters to a multiple of twice the data-parallel ranks, ZeRO 3 each
    parameter to a multiple of them.
    """
    if not config.train.ema_decay:
        return 0
    ranks, stage = config.data_parallel_size(world_size), config.zero_stage_on(world_size, precision)
    held = stage_weights(config.model, pipeline_layout(config), pipeline_stage)
    table = [(w.decays, w.on_rank(config.parallel.tensor_model_parallel_size)) for w in held]
    if stage == 0:
        return _FP32 * sum(size for _, size in table)
    if stage == 3:
        return _FP32 * sum(-(-size // ranks) for _, size in table)
    apart = config.optim.weight_decay_on == "matrices"
    groups = [
        sum(size for decays, size in table if not apart or decays is kind)
        for kind in ((True, False) if apart else (True,))
    ]
    return _FP32 * sum(2 * -(-size // (2 * ranks)) for size in groups)


def _gradients(config: Config, stage: int, precision: str, count: int, share: int) -> int:
    if stage == 3 and config.offloads_optimizer:
        return 0
    return ELEMENT_BYTES[config.grad_dtypes(precision)[0]] * (share if stage >= 2 else count)


def _reduce_buffers(config: Config, stage: int, precision: str, count: int, share: int) -> int:
    """Bytes that the reduction over data-parallel ranks needs beside those sums.

    Stages 1 and 2 only use them when there is something to reduce to other ranks, stage 0 has none.
    """
    zero = config.deepspeed.get("zero_optimization", {})
    element = ELEMENT_BYTES[precision]
    summed, reduced = (ELEMENT_BYTES[dtype] for dtype in config.grad_dtypes(precision))
    if stage == 0:
        return 0
    if config.has_bf16_optimizer(precision):
        return reduced * count if reduced != summed else 0
    bucket = int(zero.get("reduce_bucket_size", BUCKET_ELEMENTS))
    if stage == 3:
        return bucket * reduced
    held = summed if stage == 1 else element
    copied = reduced if reduced != held else 0
    beside = summed * share if stage == 1 and summed != element else 0
    return bucket * (held * (2 if zero.get("overlap_comm", False) else 1) + copied) + beside
