"""What a user should know before a run starts, each with its remedy. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from megatron_sgt.arch.weights import layer_weights
from megatron_sgt.config import Config, TrainConfig, parse_config
from megatron_sgt.config.pipeline import AUTO
from megatron_sgt.errors import ConfigError
from megatron_sgt.metrics.units import file_size
from megatron_sgt.planning.hardware import USABLE
from megatron_sgt.planning.loop_cost import choose_loop_method, loop_flops, loop_methods
from megatron_sgt.planning.parameters import stage_parameter_count
from megatron_sgt.planning.pipeline import bubble, cut_cost, expected_plan, pipeline_layout
from megatron_sgt.planning.rank_memory import peak_memory
from megatron_sgt.planning.stages import StagePlan
from megatron_sgt.planning.step_time import Machine
from megatron_sgt.planning.structure import most_kept_heads, schedule_of

SMALL_SHARE = 250_000
"""Elements of a layer per rank below which ZeRO-3 sends many small messages."""
LARGE_BUBBLE, LARGE_IMBALANCE = 0.15, 0.05
"""Shares of a step that a pipeline may lose without a word."""
RECOMPUTE: tuple[str, ...] = get_args(TrainConfig.model_fields["recompute_granularity"].annotation)
"""Every granularity that the configuration knows."""


def warnings(stages: Sequence[StagePlan], world_size: int, machine: Machine, precision: str) -> Iterator[str]:
    """One sentence each, the worst first."""
    last = stages[-1].config
    yield from _memory(stages, world_size, machine, precision)
    yield from schedule_of(last).advice(last.train.train_iters)
    yield from _loops(last)
    yield from _layout(last, world_size, machine)
    yield from _pipeline(stages, world_size)


def _memory(stages: Sequence[StagePlan], world_size: int, machine: Machine, precision: str) -> Iterator[str]:
    limit = USABLE * machine.gpu.memory
    beginning = stages[0]
    first = peak_memory(beginning.config, [beginning.stretches[0].plan], world_size, precision)
    peaks = [one.peak(world_size, precision) for one in stages]
    worst = max(peaks)
    if worst <= limit:
        return
    begun = next(n for n, peak in enumerate(peaks) if peak > limit)
    when = f"only in stage {begun}" if begun else "only after growth"
    when = "from the start" if first > limit else f"{when}: the run would end in the middle"
    text = f"does not fit: {file_size(worst)} per rank of {file_size(limit)} usable, {when}"
    ways = list(_ways_to_fit(stages, world_size, precision, limit))
    if ways:
        yield f"{text}; it fits with {', or '.join(ways)}"
    else:
        piped = stages[-1].config.parallel.pipeline_model_parallel_size > 1
        other = "more pipeline stages, ZeRO-1" if piped else "ZeRO-3"
        yield f"{text}; no single change is enough: combine more GPUs, tensor parallelism, {other} and full recompute"


def _ways_to_fit(stages: Sequence[StagePlan], world_size: int, precision: str, limit: float) -> Iterator[str]:
    config = stages[-1].config
    train, parallel = config.train, config.parallel
    changes: list[dict[str, Any]] = []
    if train.micro_batch_size > 1:
        changes.append({"train.micro_batch_size": train.micro_batch_size // 2})
    if train.recompute_granularity != "full":
        changes.append({"train.recompute_granularity": "full", "train.recompute_layers": None})
    changes += [{"parallel.zero_stage": stage} for stage in (1, 3) if stage > parallel.zero_stage]
    if parallel.pipeline_model_parallel_layout == AUTO:
        changes.append({"parallel.pipeline_model_parallel_size": 2 * parallel.pipeline_model_parallel_size})
    tensor = 2 * parallel.tensor_model_parallel_size
    changes.append({"parallel.tensor_model_parallel_size": tensor, "parallel.sequence_parallel": True})
    for change in changes:
        size = _peak_with(change, stages, world_size, precision)
        if size is not None and size <= limit:
            shown = " ".join(f"{name}={str(value).lower()}" for name, value in change.items() if value is not None)
            yield f"{shown} ({file_size(size)})"


def _peak_with(change: dict[str, Any], stages: Sequence[StagePlan], world_size: int, precision: str) -> int | None:
    """The peak of the run with other settings; None where they contradict the rest, in any stage."""
    sizes = []
    for one in stages:
        try:
            other = changed(one.config, change)
            other.num_micro_batches(world_size)
        except ConfigError:
            return None
        sizes.append(peak_memory(other, one.plans, world_size, precision))
    return max(sizes)


def other_layouts(stages: Sequence[StagePlan], world_size: int, precision: str) -> list[dict[str, Any]]:
    """Bytes on the fullest rank at the worst moment: one row per ZeRO stage, one entry per recompute granularity.

    None where the two contradict the rest of the configuration.
    """

    def peak(stage: int, granularity: str) -> int | None:
        if stage == 0 and precision != "fp32":
            return None  # refused when a run starts
        change = {"parallel.zero_stage": stage, "train.recompute_granularity": granularity}
        if granularity == "none":
            change["train.recompute_layers"] = None
        return _peak_with(change, stages, world_size, precision)

    return [
        {"zero_stage": stage, **{granularity: peak(stage, granularity) for granularity in RECOMPUTE}}
        for stage in range(4)
    ]


def changed(config: Config, values: dict[str, Any]) -> Config:
    """``config`` with dotted values set, validated again.

    Raises:
        ConfigError: the values do not go together.
    """
    sections = config.model_dump()
    for name, value in values.items():
        section, _, key = name.partition(".")
        sections[section][key] = value
    return parse_config(sections)


def _loops(config: Config) -> Iterator[str]:
    ranks = config.parallel.tensor_model_parallel_size
    heads = tuple(range(most_kept_heads(config)))
    if not heads or choose_loop_method(config)[0] != "owner" or "balanced" not in loop_methods(config):
        return
    busiest = max(loop_flops(config, "owner", heads, rank).executed for rank in range(ranks))
    share = busiest * ranks / sum(loop_flops(config, "owner", heads, rank).executed for rank in range(ranks))
    if share > 1.15:
        yield (
            f"kept heads may fall on one of {ranks} tensor-parallel ranks: it then does {share:.3g} times the mean of "
            f"the loop while the others wait ({choose_loop_method(config)[1]}); parallel.loop_method=balanced shares it"
        )


def _layout(config: Config, world_size: int, machine: Machine) -> Iterator[str]:
    parallel, train = config.parallel, config.train
    tensor, node = parallel.tensor_model_parallel_size, machine.gpus_per_node
    replicas = config.data_parallel_size(world_size)
    if tensor > node:
        yield (
            f"tensor parallel {tensor} reaches over nodes of {node} GPUs: every layer then waits for the network; "
            f"parallel.tensor_model_parallel_size={node} keeps it inside"
        )
    elif node % tensor:
        yield f"tensor parallel {tensor} does not divide nodes of {node} GPUs: some groups reach over two nodes"
    even = all(length % tensor == 0 for length in config.seq_lengths.every)
    if tensor > 1 and not parallel.sequence_parallel and even:
        yield (
            "activations are replicated over tensor-parallel ranks; parallel.sequence_parallel=true stores a "
            f"{_fraction(tensor)} of those outside the matrix products, with the same bytes sent"
        )
    micro_batches = config.num_micro_batches(world_size)
    if parallel.zero_stage == 2 and micro_batches > 1 and replicas > 1:
        yield (
            f"ZeRO-2 reduces gradients in each of {micro_batches} micro-batches, ZeRO-1 once per step; "
            "parallel.zero_stage=1, if its gradients fit"
        )
    if parallel.zero_stage == 3 and replicas > 1:
        layer = sum(w.on_rank(tensor) for w in layer_weights(config.model, 0) if w.decays)
        if layer // replicas < SMALL_SHARE:
            yield (
                f"ZeRO-3 leaves {layer // replicas:,} elements of a layer on each of {replicas} ranks: messages of "
                "little size in every layer and micro-batch; parallel.zero_stage=1 sends once per step"
            )
    if parallel.zero_stage == 0 and replicas > 1:
        stages = range(parallel.pipeline_model_parallel_size)
        count = 8 * max(stage_parameter_count(config, stage, tensor) for stage in stages)
        yield (
            f"ZeRO-0 keeps {file_size(count)} of optimizer state on each of {replicas} replicas; "
            f"parallel.zero_stage=1 keeps {file_size(1.5 * count / replicas)}, for half as much traffic again"
        )
    if config.checkpoint.save_interval == 0:
        yield "saves only at the end; checkpoint.save_interval=N saves every N steps"
    if train.precision == "fp32" and parallel.device != "cpu":
        yield "train.precision fp32 does without matrix units: train.precision=bf16 is many times faster"


def _pipeline(stages: Sequence[StagePlan], world_size: int) -> Iterator[str]:
    config = stages[-1].config
    parallel, layout = config.parallel, pipeline_layout(config)
    if layout.size == 1:
        return
    micro_batches = config.num_micro_batches(world_size)
    waiting = bubble(layout.size, layout.virtual_size, micro_batches)
    if waiting > LARGE_BUBBLE:
        more = "a smaller train.micro_batch_size" if config.train.micro_batch_size > 1 else "fewer pipeline stages"
        if virtual := _more_chunks(stages, world_size):
            more += f", or parallel.virtual_pipeline_model_parallel_size={virtual},"
        yield (
            f"{micro_batches} micro-batches through {layout.size} pipeline stages leave them waiting "
            f"{100 * waiting:.0f} % of a step; {more} makes that less"
        )
    if parallel.pipeline_model_parallel_layout == AUTO:
        return
    plan = expected_plan(config)
    best = pipeline_layout(changed(config, {"parallel.pipeline_model_parallel_layout": AUTO}))
    lost, least = (cut_cost(config, plan, one).imbalance for one in (layout, best))
    if lost > LARGE_IMBALANCE and lost > least + 0.01:
        yield (
            f"the largest of the pipeline stages {layout} does {100 * lost:.0f} % more than their mean after growth; "
            f"parallel.pipeline_model_parallel_layout={best} (auto) leaves {100 * least:.1f} %"
        )


def _more_chunks(stages: Sequence[StagePlan], world_size: int) -> int | None:
    """Twice as many chunks per pipeline stage, if the rules accept that in all stages of the run."""
    virtual = 2 * stages[-1].config.parallel.virtual_pipeline_model_parallel_size
    try:
        for one in stages:
            more = changed(one.config, {"parallel.virtual_pipeline_model_parallel_size": virtual})
            more.num_micro_batches(world_size)
    except ConfigError:
        return None
    return virtual


def _fraction(ranks: int) -> str:
    return {2: "half", 4: "quarter", 8: "eighth"}.get(ranks, f"1/{ranks}")
