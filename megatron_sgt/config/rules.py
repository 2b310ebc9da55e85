"""The rules between the sections of a configuration. Each yields one line per broken rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_sgt.config.base import count, shown
from megatron_sgt.config.hints import misspelt_deepspeed_key
from megatron_sgt.config.lengths import SequenceLengths, check_lengths
from megatron_sgt.config.phases import check_phases, phases_of
from megatron_sgt.config.pipeline import AUTO, parse_layout
from megatron_sgt.config.run import resolve_precision

if TYPE_CHECKING:
    from megatron_sgt.config.root import Config

ZERO_0_HALF = "{} with zero_stage 0 reports wrong gradient norms; use parallel.zero_stage 1, or train.precision fp32"


def check_model(cfg: Config) -> Iterator[str]:
    """Yield the rules that the model breaks together with the tensor-parallel size or the tokenizer."""
    tensor_parallel = cfg.parallel.tensor_model_parallel_size
    for name in (
        "num_attention_heads",
        "num_query_groups",
        "ffn_hidden_size",
        "make_vocab_size_divisible_by",
    ):
        value = getattr(cfg.model, name)
        if value % tensor_parallel:
            yield f"model.{name}: {value} is not a multiple of tensor_model_parallel_size {tensor_parallel}"
    if cfg.model.vocab_size is None and cfg.data.tokenizer is None:
        yield "model.vocab_size: is required when data.tokenizer is null"


def check_growth(cfg: Config) -> Iterator[str]:
    """Yield the rules that the growth schedule breaks on this model."""
    growth, num_layers, num_heads = cfg.growth, cfg.model.num_layers, cfg.model.num_attention_heads
    for name in ("exclude_layers", "block_loop_layers"):
        outside = [layer for layer in getattr(growth, name) if not 0 <= layer < num_layers]
        if outside:
            yield f"growth.{name}: {outside} outside the model's layers 0..{num_layers - 1}"
    if growth.ramp is not None:
        yield from (f"growth.ramp.{line}" for line in growth.ramp.misfits(num_layers, cfg.model.ffn_hidden_size))
    if cfg.data.tells_documents and growth.entropy_min_document_tokens > cfg.model.seq_length:
        yield (
            f"growth.entropy_min_document_tokens: no document in a sequence of model.seq_length {cfg.model.seq_length} "
            f"is {growth.entropy_min_document_tokens} tokens long, so that no entropy would count; lower it"
        )
    if growth.method != "sgt":
        return
    if growth.num_keep_heads > num_heads and growth.head_choice != "all":
        yield f"growth.num_keep_heads: {growth.num_keep_heads} is above model.num_attention_heads {num_heads}"
    selectable = num_layers - len(growth.exclude_layers)
    if growth.top_k_layers > selectable:
        yield (
            f"growth.top_k_layers: {growth.top_k_layers} is above the {selectable} layers that may be "
            f"selected ({num_layers} layers, {len(growth.exclude_layers)} in exclude_layers)"
        )


def check_parallel(cfg: Config) -> Iterator[str]:
    """Yield the rules that the parallel layout breaks with the model and the precision."""
    parallel, seq_length = cfg.parallel, cfg.model.seq_length
    tensor_parallel = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and tensor_parallel == 1:
        yield "parallel.sequence_parallel: needs tensor_model_parallel_size above 1, got 1"
    elif parallel.sequence_parallel and seq_length % tensor_parallel:
        yield (
            f"parallel.sequence_parallel: model.seq_length {seq_length} is not a multiple of "
            f"tensor_model_parallel_size {tensor_parallel}"
        )
    if parallel.loop_method == "balanced":
        if seq_length % tensor_parallel:
            yield (
                f"parallel.loop_method: balanced needs model.seq_length, {seq_length}, to be a multiple of "
                f"tensor_model_parallel_size {tensor_parallel}"
            )
        if cfg.model.norms_all_heads:
            yield (
                "parallel.loop_method: balanced loops project the kept heads alone, and model.qk_layernorm_over all "
                "needs the projections of all heads; use owner"
            )
        if cfg.model.attention_dropout > 0:
            yield (
                f"parallel.loop_method: balanced has no attention dropout; set model.attention_dropout 0 instead "
                f"of {cfg.model.attention_dropout}, or loop_method: owner"
            )
    outside = [n for n in cfg.train.recompute_layers or () if not 0 <= n < cfg.model.num_layers]
    if outside:
        yield f"train.recompute_layers: {outside} outside the model's layers 0..{cfg.model.num_layers - 1}"
    if cfg.train.recompute_layers and cfg.train.recompute_granularity == "none":
        yield "train.recompute_layers: has no effect with recompute_granularity 'none'; set selective or full"
    if parallel.zero_stage == 0 and _precision(cfg) in ("bf16", "fp16"):
        yield f"parallel.zero_stage: {ZERO_0_HALF.format(_precision(cfg))}"


def check_pipeline(cfg: Config) -> Iterator[str]:
    """Yield the rules that the pipeline breaks with the model and the precision."""
    parallel, num_layers = cfg.parallel, cfg.model.num_layers
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    setting = parallel.pipeline_model_parallel_layout
    if stages == 1:
        if setting != AUTO:
            yield "parallel.pipeline_model_parallel_layout: has no effect with pipeline_model_parallel_size 1"
        return
    if stages * virtual > num_layers:
        parts = f"{stages}" + (f" x virtual_pipeline_model_parallel_size {virtual}" if virtual > 1 else "")
        whose, way_out = "the model", "use fewer parts"
        if cfg.growth.stages:
            whose = "the first model of growth.stages (growth stage 0)"
            way_out += f", or another preset or stages that begin with at least {stages * virtual} layers"
        yield (
            f"parallel.pipeline_model_parallel_size: {parts} needs a layer for each part, {whose} has "
            f"{count(num_layers, 'layer')}; {way_out}"
        )
    elif setting != AUTO:
        try:
            parse_layout(setting, stages, virtual, num_layers)
        except ValueError as error:
            yield f"parallel.pipeline_model_parallel_layout: {shown(setting)}: {error}"
    if _precision(cfg) == "fp16":
        yield (
            f"parallel.pipeline_model_parallel_size: {stages} with train.precision fp16 was never run, as the "
            "gradients between stages carry the loss scale; use bf16"
        )
    zero = cfg.deepspeed.get("zero_optimization")
    if virtual > 1 and isinstance(zero, dict) and zero.get("overlap_comm") not in (None, False, "auto"):
        yield (
            f"deepspeed.zero_optimization.overlap_comm: true with virtual_pipeline_model_parallel_size {virtual} would "
            "reduce the gradients of the last part alone; leave it out"
        )
    if virtual > 1 and parallel.zero_stage == 2 and cfg.offloads_optimizer:
        yield (
            f"parallel.zero_stage: 2 with virtual_pipeline_model_parallel_size {virtual} and offload_optimizer would "
            "lose the gradients of all parts but one, as DeepSpeed copies them in the last backward pass of a step; "
            "use zero_stage 1, or no virtual parts"
        )
    if not cfg.deepspeed.get("managed_gradient_accumulation", True):
        yield (
            f"deepspeed.managed_gradient_accumulation: {shown(cfg.deepspeed['managed_gradient_accumulation'])} with "
            f"pipeline_model_parallel_size {stages} has no mark for the last backward pass of a step; leave it out"
        )


def check_start(cfg: Config) -> Iterator[str]:
    """Yield the rules that the beginning of the run breaks."""
    checkpoint = cfg.checkpoint
    if checkpoint.start == "weights":
        if checkpoint.load is None:
            yield "checkpoint.start: weights needs checkpoint.load, the checkpoint that a new run begins with"
        return
    for name, given in (("growth", checkpoint.growth), ("weights", checkpoint.weights)):
        if given not in (None, "model"):
            yield (
                f"checkpoint.{name}: {given} has no effect with checkpoint.start resume, which goes on with "
                "everything; leave it out, or set checkpoint.start to weights"
            )


def check_steps(cfg: Config) -> Iterator[str]:
    """Yield the rules that step and batch counts break."""
    train, optim, decay_iters = cfg.train, cfg.optim, cfg.lr_decay_iters
    if train.global_batch_size % train.micro_batch_size:
        yield (
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size {train.micro_batch_size}"
        )
    if cfg.evaluation.tasks and cfg.data.tokenizer is None:
        yield "evaluation.tasks: tasks are text, but data.tokenizer is null; set it, or remove them"
    if train.eval_at_start and not train.eval_interval:
        yield "train.eval_at_start: has no effect with train.eval_interval 0; set how often to validate"
    if train.spike_sigma is not None and not cfg.checkpoint.save_interval:
        yield (
            f"train.spike_sigma: {train.spike_sigma:g} needs checkpoints to go back to; set checkpoint.save_interval"
        )
    end = "train.train_iters" if optim.lr_decay_iters is None else "optim.lr_decay_iters"
    if optim.lr_warmup_iters > decay_iters:
        yield f"optim.lr_warmup_iters: {optim.lr_warmup_iters} is above {end} {decay_iters}"
    elif optim.lr_wsd_decay_iters is not None and optim.lr_warmup_iters + optim.lr_wsd_decay_iters > decay_iters:
        yield (
            f"optim.lr_wsd_decay_iters: {optim.lr_wsd_decay_iters} and lr_warmup_iters "
            f"{optim.lr_warmup_iters} do not fit into {end} {decay_iters}"
        )


def check_curriculum(cfg: Config) -> Iterator[str]:
    """Yield the rules that the lengths of a curriculum, or of phases, break."""
    parallel, sharer = cfg.parallel, None
    if parallel.sequence_parallel:
        sharer = "parallel.sequence_parallel"
    elif parallel.loop_method == "balanced":
        sharer = "parallel.loop_method balanced"
    tensor_parallel = parallel.tensor_model_parallel_size
    if not cfg.phases:
        yield from check_lengths(cfg.seq_lengths, tensor_parallel, sharer)
    for phase in phases_of(cfg):  # whose ends check_phases has looked at
        if length := phase.settings.seq_length:
            alone = SequenceLengths(cfg.model.seq_length, (phase.number,), (length,))
            yield from check_lengths(alone, tensor_parallel, sharer, (phase.where,))


def check_deepspeed(cfg: Config) -> Iterator[str]:
    """Yield the contradictions between the raw DeepSpeed keys and the typed sections, naming both values."""
    for name, owner in (("optimizer", "optim"), ("scheduler", "optim")):
        if name in cfg.deepspeed:
            yield f"deepspeed.{name}: is refused, the {name} is built from the section '{owner}'"
    if "curriculum_learning" in cfg.deepspeed:
        yield "deepspeed.curriculum_learning: is refused, a curriculum of lengths is data.seq_length_curriculum"
    for name in cfg.deepspeed:
        meant = misspelt_deepspeed_key(name)
        if meant is not None:
            yield f"unknown key 'deepspeed.{name}'; did you mean '{meant}'?"
    for path, owner, expected in _derived_deepspeed_values(cfg):
        section, _, key = path.rpartition(".")
        values = cfg.deepspeed.get(section, {}) if section else cfg.deepspeed
        if not isinstance(values, dict):
            yield f"deepspeed.{section}: must be a mapping, got {shown(values)}"
            continue
        value = values.get(key, "auto")
        if value != "auto" and (value != expected or isinstance(value, bool) != isinstance(expected, bool)):
            yield f"deepspeed.{path}: {shown(value)} contradicts {owner}; leave it out, or write 'auto'"
    if cfg.train.ema_decay and cfg.offload_device == "nvme":
        yield (
            f"train.ema_decay: {cfg.train.ema_decay:g} needs the fp32 weights in memory; set "
            "deepspeed.zero_optimization.offload_optimizer.device to cpu instead of nvme, or ema_decay to 0"
        )
    name, train = "gradient_accumulation_steps", cfg.train
    steps = cfg.deepspeed.get(name, "auto")
    if steps == "auto":
        return
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        yield f"deepspeed.{name}: must be 'auto' or an integer above 0, got {shown(steps)}"
    elif train.global_batch_size % (train.micro_batch_size * steps):
        yield (
            f"deepspeed.{name}: {steps} contradicts train.global_batch_size {train.global_batch_size}, "
            f"no multiple of {steps} x train.micro_batch_size {train.micro_batch_size}"
        )


def _derived_deepspeed_values(cfg: Config) -> Iterator[tuple[str, str, Any]]:
    """Yield (DeepSpeed key, the field that owns it with its value, the only value allowed)."""
    train, precision = cfg.train, _precision(cfg)
    for path, owner, expected in (
        ("train_batch_size", "train.global_batch_size", train.global_batch_size),
        ("train_micro_batch_size_per_gpu", "train.micro_batch_size", train.micro_batch_size),
        ("gradient_clipping", "optim.clip_grad", cfg.optim.clip_grad),
        ("zero_optimization.stage", "parallel.zero_stage", cfg.parallel.zero_stage),
    ):
        yield path, f"{owner} {expected}", expected
    for path, setting in (
        ("data_types.grad_accum_dtype", "grad_accum_dtype"),
        ("communication_data_type", "grad_reduce_dtype"),
    ):
        chosen = getattr(cfg.optim, setting)
        of_model = None if precision == "auto" else precision
        yield path, f"optim.{setting} '{chosen}'", of_model if chosen == "model" else "fp32"
    # While the precision depends on the device, no fixed switch can be right, so none equals None.
    for key, kind in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
        yield (
            f"{key}.enabled",
            f"train.precision '{precision}'",
            None if precision == "auto" else precision == kind,
        )


def _precision(cfg: Config) -> str:
    return resolve_precision(cfg.train.precision, cfg.parallel.device)


RULES = (
    check_model,
    check_growth,
    check_parallel,
    check_pipeline,
    check_start,
    check_steps,
    check_phases,
    check_curriculum,
    check_deepspeed,
)
