"""The whole configuration: all sections, and the rules between them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from megatron_sgt.config.base import EXPAND, Section, shown
from megatron_sgt.config.data import DataConfig
from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.config.hints import misspelt_deepspeed_key
from megatron_sgt.config.lengths import SequenceLengths, check_lengths
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.config.optim import OptimConfig
from megatron_sgt.config.parallel import ParallelConfig
from megatron_sgt.config.run import CheckpointConfig, LoggingConfig, TrainConfig, resolve_precision
from megatron_sgt.config.yaml_io import dump_yaml
from megatron_sgt.errors import ConfigError
from megatron_sgt.paths import expand

ZERO_0_HALF = "{} with zero_stage 0 reports wrong gradient norms; use parallel.zero_stage 1, or train.precision fp32"


class Config(Section):
    """A complete run. ``load_config`` makes one from YAML with one clear line per mistake."""

    model: ModelConfig = Field(description="Shape of the decoder.")
    growth: GrowthConfig = Field(default_factory=GrowthConfig, description="How depth grows.")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="Parallel layout.")
    optim: OptimConfig = Field(description="Optimizer and learning rate.")
    train: TrainConfig = Field(description="Length, batches, numerics.")
    data: DataConfig = Field(default_factory=DataConfig, description="Data sets and tokenizer.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Saving and loading.")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="Output of the run.")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="DeepSpeed JSON keys for experts, merged over the generated ones. A value that "
        "contradicts another section is refused; 'auto' takes that section's value.",
    )

    @field_validator("deepspeed", mode="after")
    @classmethod
    def _fill_in_paths(cls, values: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return _with_paths(values, (info.context or {}).get(EXPAND, expand))

    def problems(self) -> Iterator[str]:
        for check in (check_model, check_growth, check_parallel, check_steps, check_curriculum, check_deepspeed):
            yield from check(self)

    @property
    def save_dir(self) -> Path:
        return Path(self.checkpoint.save or Path(self.logging.run_dir, "checkpoints"))

    @property
    def data_cache_dir(self) -> Path:
        return Path(self.data.data_cache_path or Path(self.logging.run_dir, "data_cache"))

    @property
    def lr_decay_iters(self) -> int:
        """Step at which the learning rate reaches min_lr."""
        return self.optim.lr_decay_iters or self.train.train_iters

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all ranks train on in one optimizer step."""
        return self.train.global_batch_size * self.model.seq_length

    @property
    def seq_lengths(self) -> SequenceLengths:
        """How long the training sequences are in each step."""
        entries = self.data.seq_length_curriculum
        ends = tuple(entry.last_step(self.tokens_per_step) for entry in entries)
        return SequenceLengths(self.model.seq_length, ends, tuple(entry.seq_length for entry in entries))

    def precision_on(self, device: str) -> str:
        """Return the precision of a run on ``device`` ("cpu" or "cuda").

        Raises:
            ConfigError: bf16 or fp16 without ZeRO, or fp16 on a CPU.
        """
        resolved = resolve_precision(self.train.precision, device)
        if resolved != "fp32" and self.parallel.zero_stage == 0:
            raise ConfigError(f"parallel.zero_stage: {ZERO_0_HALF.format(resolved)}")
        if resolved == "fp16" and device == "cpu":
            raise ConfigError("train.precision: fp16 needs a GPU, this run is on a CPU; use fp32 or bf16")
        return resolved

    def grad_dtypes(self, precision: str) -> tuple[str, str]:
        """Return the types that gradients are summed in: over micro-batches, and over data-parallel ranks."""
        optim = self.optim
        return (
            precision if optim.grad_accum_dtype == "model" else "fp32",
            precision if optim.grad_reduce_dtype == "model" else "fp32",
        )

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's state and update are on the CPU (or NVMe) instead of the ranks' devices."""
        return self.offload_device != "none"

    @property
    def offload_device(self) -> str:
        """Where the optimizer's state is instead of on the ranks' devices: "cpu", "nvme" or "none"."""
        zero = self.deepspeed.get("zero_optimization")
        section = zero.get("offload_optimizer") if isinstance(zero, dict) else None
        return str(section.get("device", "none")) if isinstance(section, dict) else "none"

    def has_bf16_optimizer(self, precision: str) -> bool:
        """Whether DeepSpeed takes its BF16_Optimizer, which keeps whole fp32 gradients and files of its own."""
        summed, _ = self.grad_dtypes(precision)
        return self.parallel.zero_stage == 1 and (precision, summed) == ("bf16", "fp32") and not self.offloads_optimizer

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of model replicas among ``world_size`` processes.

        Raises:
            ConfigError: ``world_size`` does not divide.
        """
        tensor_parallel = self.parallel.tensor_model_parallel_size
        if world_size % tensor_parallel:
            raise ConfigError(
                f"parallel.tensor_model_parallel_size: {tensor_parallel} does not divide the "
                f"{world_size} process{'' if world_size == 1 else 'es'} of this run; start a multiple of "
                f"{tensor_parallel} (torchrun --nproc-per-node {tensor_parallel} ...), or change it"
            )
        return world_size // tensor_parallel

    def zero_stage_on(self, world_size: int, precision: str) -> int:
        """Return the ZeRO stage that a run really has.

        On a single data-parallel rank there is nothing to shard, but ZeRO would still copy every weight and every
        gradient into its buffers and back. So an fp32 run goes without it: the same numbers with less memory and time.
        (Half precision needs ZeRO's fp32 weights; a run that sets deepspeed.zero_optimization gets ZeRO.)

        Raises:
            ConfigError: as ``data_parallel_size``.
        """
        alone = self.data_parallel_size(world_size) == 1 and precision == "fp32"
        return 0 if alone and not self.deepspeed.get("zero_optimization") else self.parallel.zero_stage

    def recomputed_layers(self, granularity: Literal["selective", "full"]) -> tuple[int, ...]:
        """Return the layers whose attention core (selective) or whole (full) the backward pass computes again."""
        train = self.train
        if train.recompute_granularity != granularity:
            return ()
        return tuple(range(self.model.num_layers)) if train.recompute_layers is None else train.recompute_layers

    def with_vocab_size(self, size: int) -> "Config":
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": size})})

    def num_micro_batches(self, world_size: int) -> int:
        """Return the micro-batches that one rank accumulates per optimizer step.

        Raises:
            ConfigError: the batch or the ranks do not divide.
        """
        data_parallel = self.data_parallel_size(world_size)
        train = self.train
        unit = train.micro_batch_size * data_parallel
        below, rest = divmod(train.global_batch_size, unit)
        if rest:
            nearest = ", ".join(f"{n * unit} (accumulation {n})" for n in (below, below + 1) if n)
            raise ConfigError(
                f"batch sizes do not multiply: global_batch_size {train.global_batch_size} != "
                f"micro {train.micro_batch_size} x accumulation {train.global_batch_size / unit:.6g} x "
                f"data parallel {data_parallel}; nearest that work: {nearest}"
            )
        wanted = self.deepspeed.get("gradient_accumulation_steps", "auto")
        if wanted not in ("auto", below):
            raise ConfigError(
                f"deepspeed.gradient_accumulation_steps: {wanted} contradicts accumulation {below} = "
                f"global_batch_size {train.global_batch_size} / (micro {train.micro_batch_size} x "
                f"data parallel {data_parallel})"
            )
        return below

    def to_yaml(self) -> str:
        """Return the resolved configuration; ``load_config`` of it gives an equal Config."""
        return dump_yaml(self.model_dump())


def _with_paths(values: dict[str, Any], how: Callable[[str], str]) -> dict[str, Any]:
    """DeepSpeed's settings with every path filled in: nvme_path, output_path, output_file and their like."""
    filled = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = _with_paths(value, how)
        elif isinstance(value, str) and value and key.endswith(("path", "dir", "file", "folder")):
            try:
                value = how(value)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        filled[key] = value
    return filled


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


def check_steps(cfg: Config) -> Iterator[str]:
    """Yield the rules that step and batch counts break."""
    train, optim, decay_iters = cfg.train, cfg.optim, cfg.lr_decay_iters
    if train.global_batch_size % train.micro_batch_size:
        yield (
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size {train.micro_batch_size}"
        )
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
    """Yield the rules that the curriculum of lengths breaks."""
    parallel, sharer = cfg.parallel, None
    if parallel.sequence_parallel:
        sharer = "parallel.sequence_parallel"
    elif parallel.loop_method == "balanced":
        sharer = "parallel.loop_method balanced"
    return check_lengths(cfg.seq_lengths, parallel.tensor_model_parallel_size, sharer)


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
