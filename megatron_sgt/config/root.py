"""The whole configuration: all sections, and the rules between them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from megatron_sgt.config.base import EXPAND, Section
from megatron_sgt.config.batches import Batches
from megatron_sgt.config.data import DataConfig
from megatron_sgt.config.evaluation import EvaluationConfig
from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.config.lengths import SequenceLengths
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.config.optim import OptimConfig
from megatron_sgt.config.parallel import ParallelConfig
from megatron_sgt.config.phases import Phase, PhaseConfig, batches_of, lengths_of, phases_of
from megatron_sgt.config.rules import RULES, ZERO_0_HALF
from megatron_sgt.config.run import CheckpointConfig, HuggingFaceConfig, LoggingConfig, TrainConfig, resolve_precision
from megatron_sgt.config.yaml_io import dump_yaml
from megatron_sgt.errors import ConfigError
from megatron_sgt.paths import expand

_MILESTONES = 10


class Config(Section):
    """A complete run. ``load_config`` makes one from YAML with one clear line per mistake."""

    model: ModelConfig = Field(description="Shape of the decoder.")
    growth: GrowthConfig = Field(default_factory=GrowthConfig, description="How depth grows.")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="Parallel layout.")
    optim: OptimConfig = Field(description="Optimizer and learning rate.")
    train: TrainConfig = Field(description="Length, batches, numerics.")
    data: DataConfig = Field(default_factory=DataConfig, description="Data sets and tokenizer.")
    phases: tuple[PhaseConfig, ...] = Field(
        default=(), description="Parts of the run, one after the other, each with its own data and schedule."
    )
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Saving and loading.")
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="Downstream tasks while the run trains."
    )
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="Output of the run.")
    huggingface: HuggingFaceConfig = Field(default_factory=HuggingFaceConfig, description="Exports of the run.")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="DeepSpeed JSON keys for experts, merged over the generated ones. A value that "
        "contradicts another section is refused; 'auto' takes that section's value.",
    )

    @field_validator("deepspeed", mode="after")
    @classmethod
    def _fill_in_paths(cls, values: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return _with_paths(values, (info.context or {}).get(EXPAND, expand))

    @field_validator("phases", mode="before")
    @classmethod
    def _none_as_empty(cls, value: Any) -> Any:
        return () if value in (None, {}) else value

    def problems(self) -> Iterator[str]:
        for check in RULES:
            yield from check(self)

    @property
    def save_dir(self) -> Path:
        return Path(self.checkpoint.save or Path(self.logging.run_dir, "checkpoints"))

    @property
    def data_cache_dir(self) -> Path:
        return Path(self.data.data_cache_path or Path(self.logging.run_dir, "data_cache"))

    @property
    def data_paths(self) -> tuple[tuple[str, ...], ...]:
        """Every blend that the run reads, that of validation first."""
        return tuple(dict.fromkeys((self.data.data_path, *(phase.data_path for phase in phases_of(self)))))

    @property
    def data_prefixes(self) -> tuple[str, ...]:
        """Every data set of these blends, as they name it, once each."""
        blends = (self.data.model_copy(update={"data_path": path}).blend() for path in self.data_paths)
        return tuple(dict.fromkeys(prefix for blend in blends for _, prefix in blend))

    def data_path_at(self, step: int) -> tuple[str, ...]:
        """The blend that step ``step`` + 1 reads."""
        phase = self.phase_at(step + 1)
        return self.data.data_path if phase is None else phase.data_path

    @property
    def lr_decay_iters(self) -> int:
        """Step at which the learning rate reaches min_lr."""
        return self.optim.lr_decay_iters or self.train.train_iters

    @property
    def milestone_interval(self) -> int:
        """Checkpoints after multiples of so many steps are never deleted; 0: there are no such.

        Where checkpoint.keep_every leaves it open, the least multiple of save_interval of which a run has at most ten.
        """
        given, interval = self.checkpoint.keep_every, self.checkpoint.save_interval
        if given is not None or not interval:
            return given or 0
        return interval * -(-self.train.train_iters // (_MILESTONES * interval))

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all ranks train on in one optimizer step, where no phase says otherwise."""
        return self.train.global_batch_size * self.model.seq_length

    @property
    def batches(self) -> Batches:
        """How many sequences each step takes."""
        return batches_of(self)

    def tokens_between(self, first: int, last: int) -> int:
        """Tokens of steps ``first`` to ``last``, both inclusive."""
        batches = self.batches
        return (batches.samples(last) - batches.samples(first - 1)) * self.model.seq_length

    @property
    def seq_lengths(self) -> SequenceLengths:
        """How long the training sequences are in each step."""
        if (of_phases := lengths_of(self)) is not None:
            return of_phases
        entries = self.data.seq_length_curriculum
        ends = tuple(entry.last_step(self.tokens_per_step) for entry in entries)
        return SequenceLengths(self.model.seq_length, ends, tuple(entry.seq_length for entry in entries))

    def phase_at(self, step: int) -> Phase | None:
        """The phase that step ``step`` belongs to, step 0 to the first; None in a run without phases."""
        phases = phases_of(self)
        return next((phase for phase in phases if step <= phase.last), phases[-1] if phases else None)

    def phase_begins_at(self, step: int) -> bool:
        """Whether ``step`` is the first one of a phase, but not of the run."""
        return any(phase.first == step > 1 for phase in phases_of(self))

    def part_begins_at(self, step: int) -> bool:
        """Whether the loss of ``step`` may differ from the one before for what it is measured on: length or phase."""
        return self.phase_begins_at(step) or self.seq_lengths.changes_at(step)

    def at_step(self, step: int) -> "Config":
        """This configuration with the model of step ``step``: in another phase it may have other positions."""
        phase = self.phase_at(step)
        if phase is None:
            return self
        positions = {"rotary_base": phase.rotary_base, "rotary_scaling": phase.rotary_scaling}
        return self.model_copy(update={"model": self.model.model_copy(update=positions)})

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
        ranks = self.parallel.model_parallel_size
        if world_size % ranks:
            raise ConfigError(
                f"{self.parallel.model_parallel_sizes} does not "
                f"divide the {world_size} process{'' if world_size == 1 else 'es'} of this run; start "
                f"a multiple of {ranks} (torchrun --nproc-per-node {ranks} ...), or change it"
            )
        return world_size // ranks

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

    def num_micro_batches(self, world_size: int, global_batch_size: int | None = None) -> int:
        """Return the micro-batches that one rank accumulates per optimizer step.

        Args:
            global_batch_size: of the step; None: of validation, and of training where no phase says otherwise. Those of
                all phases are checked then, too.

        Raises:
            ConfigError: the batch or the ranks do not divide.
        """
        if global_batch_size is not None:
            return self._micro_batches(world_size, global_batch_size)
        for phase in phases_of(self):
            for size in phase.sizes:
                try:
                    self._micro_batches(world_size, size)
                except ConfigError as error:
                    raise ConfigError(f"{phase.where}: {error}") from None
        return self._micro_batches(world_size, self.train.global_batch_size)

    def _micro_batches(self, world_size: int, size: int) -> int:
        data_parallel = self.data_parallel_size(world_size)
        train = self.train
        unit = train.micro_batch_size * data_parallel
        parallel = self.parallel
        stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
        below, rest = divmod(size, unit)
        if rest:
            step = stages if virtual > 1 else 1
            lower = below // step * step
            nearest = ", ".join(f"{n * unit} (accumulation {n})" for n in (lower, lower + step) if n)
            raise ConfigError(
                f"batch sizes do not multiply: global_batch_size {size} != "
                f"micro {train.micro_batch_size} x accumulation {size / unit:.6g} x "
                f"data parallel {data_parallel}; nearest that work: {nearest}"
            )
        wanted = self.deepspeed.get("gradient_accumulation_steps", "auto")
        if wanted not in ("auto", below):
            raise ConfigError(
                f"deepspeed.gradient_accumulation_steps: {wanted} contradicts accumulation {below} = "
                f"global_batch_size {size} / (micro {train.micro_batch_size} x "
                f"data parallel {data_parallel})"
            )
        # Megatron-Core sends as many micro-batches as there are stages through a chunk before the next chunk's turn.
        if virtual > 1 and below % stages:
            fits = unit * stages * max(1, round(below / stages))
            raise ConfigError(
                f"parallel.virtual_pipeline_model_parallel_size: {virtual} needs a multiple of "
                f"pipeline_model_parallel_size {stages} micro-batches in a step, got accumulation {below} = "
                f"global_batch_size {size} / (micro {train.micro_batch_size} x data parallel "
                f"{data_parallel}); nearest global_batch_size that works: {fits}"
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
