"""Everything that tools/plan.py reports about a run, as a JSON-able dictionary of numbers. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_sgt.arch.attended_pairs import AttendedPairs
from megatron_sgt.config import Config
from megatron_sgt.config.lengths import LengthSpan
from megatron_sgt.growth import ENTROPY, LoopPlan
from megatron_sgt.planning.advice import other_layouts, warnings
from megatron_sgt.planning.flops import at_length, flops_between, overhead, step_flops
from megatron_sgt.planning.hardware import USABLE
from megatron_sgt.planning.kept import kept_steps, milestones, saved_steps
from megatron_sgt.planning.loop_cost import choose_loop_method, loop_methods
from megatron_sgt.planning.parameters import checkpoint_bytes, parameter_count, parameters_by_part
from megatron_sgt.planning.phases import parts_within, phase_table
from megatron_sgt.planning.pipeline import describe_cut, pipeline_layout
from megatron_sgt.planning.rank_memory import rank_memory
from megatron_sgt.planning.stages import StagePlan, plan_stages, stage_table
from megatron_sgt.planning.step_time import NOT_CALIBRATED, Machine, step_time
from megatron_sgt.planning.structure import FIXED, Stretch, final_plan, schedule_of
from megatron_sgt.planning.tensor_traffic import loop_pass_traffic
from megatron_sgt.planning.traffic import group_sizes, step_traffic

ERROR_BARS = (
    "parameters and FLOPs: exact, as the built model and torch's counter count them",
    "weights, gradients, optimizer, saved activations: within 5 % of the live tensors (CPU; activations in fp32)",
    "not in the memory: context, workspaces, NCCL buffers, fragmentation; 8 % of the device is left for them",
    "traffic: exact to the byte for tensor parallelism, ZeRO 0-3, pipelines (4 ranks); calls of ZeRO-3 are a bound",
    "pipeline stages: micro-batches in flight exact; memory within 5 % of the live tensors of 2 stages (CPU, fp32)",
    "step time: assumed efficiencies, measured nowhere; days rest on the stated MFU alone",
)
BOUNDARY_ERROR = "boundaries between stages: assumed rates of storage and cores, measured nowhere"


def make_plan(
    config: Config,
    world_size: int,
    machine: Machine,
    mfu: float,
    precision: str,
    pairs: AttendedPairs | None = None,
) -> dict[str, Any]:
    """The plan of ``config`` on ``world_size`` ranks. ``mfu``: model FLOPs over peak FLOPs, in (0, 1].

    ``pairs``: of the data; None: every sequence is taken as one document, which ``documents`` says where it may not be.

    Of a run of several stages, ``stages`` has a row for each; parameters, traffic and step time are those of the last
    one, memory that of the stage with the fullest rank. Of a pipeline, memory is that of the stage with the fullest
    rank and traffic that of the one that sends most; both have a row for each pipeline stage, too; ``pipeline`` is the
    cut.

    Raises:
        ConfigError: the ranks or the batch do not divide, the peak is not known, or the stages are refused.
    """
    stages = plan_stages(config, pairs)
    last, fullest = stages[-1].config, max(stages, key=lambda one: one.peak(world_size, precision))
    compute = [entry for one in stages for entry in _compute(one, several=len(stages) > 1)]
    total, peak = sum(entry["flops"] for entry in compute), machine.gpu.peak(precision)
    plan: dict[str, Any] = {
        "parameters": {"total": parameter_count(last.model), **parameters_by_part(last.model)},
        "layout": _layout(config, last, world_size, machine, precision),
        "batch": _batch(config, world_size),
        "memory": {
            "limit": USABLE * machine.gpu.memory,
            **_memory(fullest, world_size, precision),
        },
        "peak_by_layout": other_layouts(stages, world_size, precision),
        "compute": compute,
        "run": {
            "steps": config.train.train_iters,
            "tokens": sum(one.tokens for one in stages),
            "flops": total,
            "mfu": mfu,
            "days": total / (world_size * peak * mfu) / 86400,
        },
        "checkpoint": _checkpoint(last, precision),
        "traffic": _traffic(last, world_size, precision),
        "step_time": _step_times(last, world_size, machine, precision, pairs),
        "warnings": list(warnings(stages, world_size, machine, precision)),
        "error_bars": list(ERROR_BARS),
    }
    if phases := phase_table(config, compute, world_size * peak * mfu):
        plan["phases"] = phases
    if config.data.reset_attention_mask:
        plan["documents"] = _documents(config, pairs)
    if cut := describe_cut(last, world_size):
        plan["pipeline"] = cut
    if len(stages) > 1:
        plan["memory"]["stage"] = fullest.stage.index
        plan["stages"] = stage_table(stages, world_size, machine, mfu, precision)
        plan["error_bars"].append(BOUNDARY_ERROR)
    return plan


def _batch(config: Config, world_size: int) -> dict[str, int]:
    return {
        "global_batch_size": config.train.global_batch_size,
        "micro_batch_size": config.train.micro_batch_size,
        "accumulation": config.num_micro_batches(world_size),
        "tokens_per_step": config.tokens_per_step,
    }


def _documents(config: Config, pairs: AttendedPairs | None) -> dict[str, Any]:
    """How much of the attention of whole sequences documents leave, by sequence length, if it was measured."""
    if pairs is None:
        return {"measured": False}
    return {
        "measured": True,
        "pairs": {str(length): pairs.pairs(length) for length in config.seq_lengths.every},
        "share": {str(length): pairs.share(length) for length in config.seq_lengths.every},
        "padding": pairs.padding,
    }


def _layout(config: Config, last: Config, world_size: int, machine: Machine, precision: str) -> dict[str, Any]:
    """How the ranks share the model, and that of the ``last`` stage its loops."""
    return {
        "world_size": world_size,
        "gpus_per_node": machine.gpus_per_node,
        "gpu": machine.gpu.driver_name,
        "tensor_parallel": config.parallel.tensor_model_parallel_size,
        "pipeline_parallel": config.parallel.pipeline_model_parallel_size,
        "virtual_pipeline_parallel": config.parallel.virtual_pipeline_model_parallel_size,
        "data_parallel": config.data_parallel_size(world_size),
        "zero_stage": config.zero_stage_on(world_size, precision),
        "precision": precision,
        "loop_method": choose_loop_method(last)[0],
    }


def _moments(one: StagePlan) -> dict[str, LoopPlan]:
    stretches, model = one.stretches, one.config.model
    moments = {"now": stretches[0].plan}
    windows = [stretch.plan for stretch in stretches if stretch.phase == "window"]
    if windows:
        moments["window"] = max(windows, key=lambda plan: step_flops(model, plan, 1).model)
    final = stretches[-1].plan if stretches[-1].phase == FIXED else final_plan(one.config)
    if final != moments["now"]:
        moments["final"] = final
    return moments


def _memory(one: StagePlan, world_size: int, precision: str) -> dict[str, Any]:
    """Bytes by part at each moment on the fullest rank; of a pipeline also on that of each of its stages."""
    config = one.config
    found = {name: rank_memory(config, plan, world_size, precision) for name, plan in _moments(one).items()}

    def worst(stage: int) -> int:
        return max(ranks[stage].total for ranks in found.values())

    layout = pipeline_layout(config)
    fullest = max(range(layout.size), key=worst)
    memory: dict[str, Any] = {name: ranks[fullest].rows() for name, ranks in found.items()}
    if layout.size > 1:
        memory["pipeline_stage"] = fullest
        memory["pipeline_stages"] = [
            {
                "pipeline_stage": stage,
                "layers": len(layout.layers(stage)),
                "in_flight": next(iter(found.values()))[stage].in_flight,
                **{name: ranks[stage].rows() for name, ranks in found.items()},
                "peak": worst(stage),
            }
            for stage in range(layout.size)
        ]
    return memory


def _checkpoint(config: Config, precision: str) -> dict[str, Any]:
    return {
        "bytes": checkpoint_bytes(config, precision),
        "saves": len(saved_steps(config)),
        "kept": config.checkpoint.keep_last,
        "milestones": milestones(config),
        "at_the_end": len(kept_steps(config)),
    }


def _compute(one: StagePlan, several: bool) -> list[dict[str, Any]]:
    return [
        ({"stage": one.stage.index} if several else {}) | _stretch(one.config, stretch, span, one.pairs)
        for stretch in one.stretches
        for span in parts_within(one.config, stretch.first, stretch.last)
    ]


def _stretch(config: Config, stretch: Stretch, span: LengthSpan, pairs: AttendedPairs | None) -> dict[str, Any]:
    """Steps of one structure, one sequence length and one phase."""
    flops = flops_between(config, stretch.plan, span.first, span.last, pairs)
    return {
        "phase": stretch.phase,
        "first_step": span.first,
        "last_step": span.last,
        "seq_length": span.seq_length,
        "loops": sum(layer.loops + layer.block_loops for layer in stretch.plan),
        "flops_per_token": flops / config.tokens_between(span.first, span.last),
        "overhead": overhead(at_length(config.model, span.seq_length), stretch.plan, pairs and pairs.at(span.first)),
        "flops": flops,
    }


def _traffic(config: Config, world_size: int, precision: str) -> dict[str, Any]:
    """Bytes by part and step; for tensor parallelism also of one loop pass and micro-batch, both ways."""
    tensor, stages = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    sizes = group_sizes(config, world_size)
    schedule = schedule_of(config)
    entropy = ENTROPY in schedule.probes
    chosen = choose_loop_method(config)[0]

    def rows(stage: int) -> list[dict[str, Any]]:
        plan = schedule.final_plan()
        return [
            {**asdict(item), "wire_bytes": item.wire_bytes(sizes[item.group])}
            for item in step_traffic(config, plan, world_size, precision, chosen, entropy, stage)
        ]

    by_stage = [rows(stage) for stage in range(stages)]
    totals = [sum(item["wire_bytes"] for item in sent) for sent in by_stage]
    busiest = totals.index(max(totals))
    traffic: dict[str, Any] = {"per_step": by_stage[busiest]}
    if stages > 1:
        traffic["pipeline_stage"] = busiest
        traffic["pipeline_stages"] = [{"pipeline_stage": n, "per_step": sent} for n, sent in enumerate(by_stage)]
    looping = next((layer for layer in schedule.final_plan(together=True) if layer.loops), None)
    if tensor > 1 and looping is not None:
        traffic["loop_pass"] = {
            method: sum(
                item.wire_bytes(tensor) for way in loop_pass_traffic(config, looping, precision, method) for item in way
            )
            for method in loop_methods(config)
        }
    ordinary = [item for item in traffic["per_step"] if item["part"] == "ordinary layers"]
    layers = len(pipeline_layout(config).layers(busiest))
    traffic["layer"] = sum(item["wire_bytes"] for item in ordinary) / layers / config.num_micro_batches(world_size)
    return traffic


def _step_times(
    config: Config, world_size: int, machine: Machine, precision: str, pairs: AttendedPairs | None
) -> dict[str, Any]:
    plan, empty = final_plan(config, together=True), LoopPlan.empty(config.model.num_layers)
    times: dict[str, Any] = {"note": NOT_CALIBRATED}
    times["vanilla"] = asdict(step_time(config, empty, world_size, machine, precision, "owner", pairs))
    vanilla = times["vanilla"]["total"] = sum(times["vanilla"].values())
    if plan.layers:
        for method in loop_methods(config) if any(plan.loops) else ("owner",):
            time = step_time(config, plan, world_size, machine, precision, method, pairs)
            # Loops on a stage that is not the largest cost its pipeline less than they take; one that becomes it, more.
            pipeline = config.parallel.pipeline_model_parallel_size > 1
            times[method] = {"loops": time.total - vanilla if pipeline else time.loops}
    return times
