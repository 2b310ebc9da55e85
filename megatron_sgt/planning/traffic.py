"""Bytes and calls of every collective of a training step, in closed form.

Those of tensor parallelism are in ``tensor_traffic``, with what a payload is.

DeepSpeed's ZeRO, n elements per rank: stage 0 and 1 all-reduce n once per step, stage 2 once per micro-batch (it
reduces by all-reduce, not reduce-scatter, as installed); 1 and 2 all-gather n once per step; stage 3 reduce-scatters n
per micro-batch and gathers weights when modules run. Gradients travel in optim.grad_reduce_dtype (4 bytes an element
unless that is model), weights in the model's type. Control messages of a few bytes (overflow flags, norms, a
pipeline's loss) are not counted.

A stage of a pipeline has its layers' share of all that, and sends per micro-batch and chunk T forward to the next chunk
and T backward to the one before (SP: T/tp). Tied embeddings, V·D/tp elements: once per step the weight goes from the
first to the last stage and its gradient back in fp32, as broadcasts of the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from megatron_sgt.arch.weight import ELEMENT_BYTES
from megatron_sgt.arch.weights import weights
from megatron_sgt.config import Config
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.parameters import borrowed_count, parameter_count, stage_parameter_count
from megatron_sgt.planning.pipeline import pipeline_layout
from megatron_sgt.planning.structure import schedule_of
from megatron_sgt.planning.tensor_traffic import Group, LoopMethod, MicroBatch, Transfer, merged

# DeepSpeed's defaults, in elements.
_BUCKET, _PERSISTENT, _KEPT_ALIVE, _PREFETCH = 5 * 10**8, 10**5, 10**9, 5 * 10**7


def group_sizes(config: Config, world_size: int) -> dict[Group, int]:
    """Ranks of each group; ``tied``: the first and the last pipeline stage.

    Raises:
        ConfigError: the ranks do not divide.
    """
    parallel, data = config.parallel, config.data_parallel_size(world_size)
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return {"tensor": tensor, "data": data, "pipeline": stages, "tied": min(2, stages), "world": world_size}


def step_traffic(
    config: Config,
    plan: LoopPlan,
    world_size: int,
    precision: str,
    method: LoopMethod,
    entropy: bool = False,
    pipeline_stage: int = 0,
) -> tuple[Transfer, ...]:
    """All collectives of one rank in one optimizer step, and all that it sends to other pipeline stages.

    Args:
        plan: the structure that is executed.
        precision: "fp32", "bf16" or "fp16", of activations and weights.
        method: how kept heads loop (``loop_cost.choose_loop_method``).
        entropy: whether entropies are collected in the step.
        pipeline_stage: the rank's.
    """
    step = MicroBatch(config, ELEMENT_BYTES[precision], method)
    layout = pipeline_layout(config)
    first, last = pipeline_stage == 0, pipeline_stage == layout.size - 1
    plans = [(layer, plan[layer]) for layer in layout.layers(pipeline_stage)]
    micro_batches = config.num_micro_batches(world_size)
    transfers: list[Transfer] = []
    if step.ranks > 1:
        alike = Counter((layer, index in step.recomputed) for index, layer in plans)
        layers = [item.times(n) for (layer, again), n in alike.items() for item in step.layer(layer, again)]
        transfers += [item.times(micro_batches) for item in (*step.ends(first, last), *layers)]
        transfers += [item for _, layer in plans for item in step.kept_weights(layer)]
    transfers += _between_stages(config, micro_batches, step, pipeline_stage)
    transfers += _data_parallel(config, world_size, micro_batches, step, precision, pipeline_stage)
    if entropy and world_size > 1:
        model = config.model
        table = model.num_layers * (1 + schedule_of(config).max_loops) * model.num_attention_heads
        transfers.append(Transfer("entropy", "world", "all_reduce", 4 * table))
    return merged(transfers)


def _between_stages(config: Config, micro_batches: int, step: MicroBatch, stage: int) -> Iterator[Transfer]:
    """What a rank sends to other stages: outputs of chunks but the last one's, gradients of inputs but the first's."""
    parallel = config.parallel
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if stages == 1:
        return
    messages = 2 * chunks - (stage == 0) - (stage == stages - 1)
    size = step.stream // step.ranks if step.sharded else step.stream
    yield Transfer("between stages", "pipeline", "send", messages * size, messages).times(micro_batches)
    tied = borrowed_count(config, stages - 1)
    if tied and stage in (0, stages - 1):
        yield Transfer("tied embedding", "tied", "broadcast", tied * (step.bytes + ELEMENT_BYTES["fp32"]), 2)


def _data_parallel(
    config: Config, world_size: int, micro_batches: int, step: MicroBatch, precision: str, pipeline_stage: int
) -> Iterator[Transfer]:
    if config.data_parallel_size(world_size) == 1:
        return
    stage, zero = config.parallel.zero_stage, config.deepspeed.get("zero_optimization", {})
    elements = stage_parameter_count(config, pipeline_stage, step.ranks)
    gradients = elements * ELEMENT_BYTES[config.grad_dtypes(precision)[1]]
    buckets = -(-elements // zero.get("reduce_bucket_size", _BUCKET))
    if stage == 3:
        yield Transfer("gradients", "data", "reduce_scatter", gradients, buckets).times(micro_batches)
        yield from _gathered_weights(config, micro_batches, step)
        return
    if config.has_bf16_optimizer(precision):
        buckets = 1  # it reduces the gradients where they are, as one vector
    reduced = Transfer("gradients", "data", "all_reduce", gradients, buckets)
    yield reduced.times(micro_batches if stage == 2 else 1)
    if stage > 0:
        calls = -(-elements // zero.get("allgather_bucket_size", _BUCKET))
        yield Transfer("weights", "data", "all_gather", elements * step.bytes, calls)


def _gathered_weights(config: Config, micro_batches: int, step: MicroBatch) -> Iterator[Transfer]:
    """ZeRO-3: small weights are gathered once after the update, the others when their module runs.

    A model of at most ``stage3_max_live_parameters`` and ``stage3_max_reuse_distance`` elements stays whole from
    the forward to the backward pass; a larger one is gathered for both. Recompute adds nothing: a layer is fetched as
    a whole (engine/deepspeed_config.py), and is still there when its backward pass computes it again.
    """
    zero = config.deepspeed.get("zero_optimization", {})
    threshold = zero.get("stage3_param_persistence_threshold", _PERSISTENT)
    alive = min(zero.get(key, _KEPT_ALIVE) for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance"))
    stays = parameter_count(config.model, step.ranks) <= alive
    small = large = 0
    for weight in weights(config.model):
        size = weight.on_rank(step.ranks)
        if size < threshold:
            small += size
            continue
        large += size * (1 if stays else 2)
    if small:
        yield Transfer("weights", "data", "all_gather", small * step.bytes)
    if large:
        calls = -(-large // zero.get("stage3_prefetch_bucket_size", _PREFETCH))
        yield Transfer("weights", "data", "all_gather", large * step.bytes, calls).times(micro_batches)
