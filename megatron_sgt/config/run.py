"""The run itself: its length and batches, its checkpoints, its log."""

from typing import Literal

from pydantic import Field

from megatron_sgt.config.base import MOST_MINUTES, MOST_SECONDS, MOST_SEED, PathText, Section


def resolve_precision(wanted: str, device: str) -> str:
    """Return what precision "auto" is on ``device``: bf16 on "cuda", fp32 on "cpu", "auto" while that is "auto"."""
    if wanted != "auto" or device == "auto":
        return wanted
    return "bf16" if device == "cuda" else "fp32"


class TrainConfig(Section):
    """Length of the run, batch sizes, numerics. The accumulation follows from the batch sizes."""

    train_iters: int = Field(gt=0, description="Optimizer steps of the run.")
    micro_batch_size: int = Field(gt=0, description="Sequences per forward pass of one data-parallel rank.")
    global_batch_size: int = Field(
        gt=0,
        description="Sequences per optimizer step: micro_batch_size x accumulation x data-parallel size.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="Type of weights and activations; auto: bf16 on GPUs, fp32 on CPUs."
    )
    seed: int = Field(default=1234, ge=0, le=MOST_SEED, description="Seed of initial weights, dropout and data order.")
    eval_interval: int = Field(default=0, ge=0, description="Validate every so many steps; 0: never.")
    eval_iters: int = Field(default=10, gt=0, description="Global batches of one validation, of each set.")
    eval_at_start: bool = Field(
        default=False, description="Validate before the first step, too; not again where the run is resumed."
    )
    max_consecutive_skipped_steps: int = Field(
        default=3,
        gt=0,
        description="The run stops after this many steps in a row without a finite loss and gradient; those are not "
        "counted in which fp16 searches for its loss scale.",
    )
    hang_timeout_seconds: float = Field(
        default=300.0,
        ge=0,
        le=MOST_SECONDS,
        description="A rank that makes no progress in an ordinary step for so long ends the run, with the stacks of "
        "all ranks; 0: never.",
    )
    slow_phase_timeout_seconds: float = Field(
        default=1800.0,
        gt=0,
        le=MOST_SECONDS,
        description="The same for the start, the first step, validation and saving, and for waiting until rank 0 has "
        "built indices or converted a checkpoint. (A collective gives up after parallel.distributed_timeout_minutes.)",
    )
    exit_interval: int | None = Field(
        default=None,
        gt=0,
        description="Save and stop after this step, before train_iters; null: run to the end.",
    )
    exit_duration_minutes: float | None = Field(
        default=None,
        gt=0,
        le=MOST_MINUTES,
        description="Save and stop, to be started again, after so many minutes of this process; null: no limit.",
    )
    exit_before_job_end_minutes: float = Field(
        default=2.0,
        ge=0,
        le=MOST_MINUTES,
        description="Under Slurm (SLURM_JOB_END_TIME): save and stop so long before the job's end, and earlier by "
        "the time that the longest save has taken.",
    )
    exit_grace_seconds: float = Field(
        default=300.0,
        gt=0,
        le=MOST_SECONDS,
        description="After a request to stop, the running step and then the save may take so long each; then the "
        "exit is forced.",
    )
    spike_sigma: float | None = Field(
        default=None,
        gt=0,
        description="A loss so many standard deviations above the mean of the last spike_window_steps losses sends "
        "the run back to its newest checkpoint, and its data on behind the spike; null: never.",
    )
    spike_window_steps: int = Field(
        default=128,
        gt=1,
        description="Accepted losses that spike_sigma judges by; before, nothing is judged.",
    )
    max_rollbacks: int = Field(
        default=3,
        gt=0,
        description="The run stops at a spike after it went back so often, restarts included.",
    )
    ema_decay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Keep an exponential moving average of the weights, with this decay per applied step; it is "
        "validated beside the weights, saved, resumed and exported (docs/checkpoints.md). 0: none.",
    )
    replica_check_interval: int = Field(
        default=0,
        ge=0,
        description="Compare the weights that several ranks hold copies of every so many steps, not only before "
        "every save; 0: only then.",
    )
    straggler_threshold: float = Field(
        default=0.15,
        ge=0,
        description="Name a rank whose own work takes this fraction longer than the median rank's, or who waits for "
        "data this fraction of a step longer, compared with the ranks of its pipeline stage (a rank that is alone on "
        "its stage is not measured, as stages differ by design); 0: do not measure.",
    )
    recompute_granularity: Literal["none", "selective", "full"] = Field(
        default="none",
        description="What the backward pass computes again: nothing, the attention core, whole layers.",
    )
    recompute_layers: tuple[int, ...] | None = Field(
        default=None, description="Layers that recompute_granularity applies to; null: all."
    )
    loop_backend: Literal["auto", "torch", "triton"] = Field(
        default="auto",
        description="Kernels of the loops of kept heads and of the entropies; auto: Triton where it can run (GPUs, "
        "RMSNorm, no dropout), else torch. triton: an error where it cannot.",
    )
    loop_attention: Literal["auto", "custom", "library"] = Field(
        default="auto",
        description="Attention of kept heads among the Triton kernels; auto: by sequences x heads, tokens and GPU. "
        "custom: the project's kernel, an error where Triton cannot run. library: torch's fastest kernel.",
    )
    fusions: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Fused rotary positions, and Megatron-Core's fused SwiGLU/GELU, cross-entropy and residual "
        "additions, which torch.compile builds when the run starts; auto: on GPUs where Triton is installed.",
    )
    hooks: tuple[str, ...] = Field(
        default=(),
        description="Hooks of installed packages that take part in the run, by their registered names, in the order in "
        "which they act (docs/extending.md).",
    )
    threads_per_rank: int | None = Field(
        default=None, gt=0, le=4096, description="CPU threads of one rank; null: torch's choice."
    )


class CheckpointConfig(Section):
    """Where checkpoints are written, how often, and what a run starts from."""

    save: PathText | None = Field(
        default=None, description="Folder for checkpoints; null: checkpoints in logging.run_dir."
    )
    load: PathText | None = Field(
        default=None,
        description="Start from this checkpoint: a folder of checkpoints (its latest) or one global_stepN. "
        "Finding none is an error.",
    )
    start: Literal["resume", "weights"] = Field(
        default="resume",
        description="What load means. resume: the run goes on from that checkpoint. weights: a new run, with its own "
        "folders, begins at step 0 with the weights of the checkpoint and nothing else of it; where save holds a "
        "checkpoint of the new run, it goes on from that (docs/checkpoints.md).",
    )
    weights: Literal["model", "ema"] = Field(
        default="model",
        description="With start weights: those that were trained, or their moving average (train.ema_decay).",
    )
    growth: Literal["keep", "restart"] | None = Field(
        default=None,
        description="With start weights: keep the loops of the checkpoint, fixed for good, or restart: begin without "
        "loops and grow anew by section growth; null: keep.",
    )
    resume: Literal["auto", "never"] = Field(
        default="auto",
        description="auto: continue from the latest checkpoint in save, if it holds one; never: do not look.",
    )
    save_interval: int = Field(default=0, ge=0, description="Save every so many steps; 0: only at the end.")
    keep_last: int = Field(default=3, ge=0, description="Checkpoints to keep, older ones are deleted; 0: all.")
    keep_every: int | None = Field(
        default=None,
        ge=0,
        description="Never delete a checkpoint at a multiple of so many steps, a milestone; null: about every tenth of "
        "the run, at a multiple of save_interval; 0: no such.",
    )
    async_save: bool = Field(
        default=False,
        description="Copy the state to host memory and write it while training goes on. Needs as much free host "
        "memory as the checkpoint takes.",
    )
    writer_timeout_seconds: float = Field(
        default=120.0,
        ge=1,
        le=3600,
        description="A run holds its folders with a lease, which it renews twelve times in so long. Another start "
        "that cannot ask after its process or its Slurm job takes them over after this time without a sign of life.",
    )
    verify: Literal["checksums", "sizes"] = Field(
        default="checksums",
        description="What is checked of a checkpoint before it is loaded: every byte, shared among the ranks, or "
        "the sizes of its files.",
    )

    @property
    def keeps_growth(self) -> bool:
        """Whether a new run that begins with given weights keeps their loops."""
        return self.growth != "restart"


class LoggingConfig(Section):
    """Where the run writes, and what it shows."""

    run_dir: PathText = Field(default="runs/default", description="Folder of everything that the run writes.")
    log_interval: int = Field(default=10, gt=0, description="Print a line every so many steps.")
    tensorboard: bool = Field(default=False, description="Write TensorBoard events into run_dir.")
    wandb_project: str | None = Field(default=None, description="Weights & Biases project; null: not used.")
    wandb_name: str | None = Field(default=None, description="Name of the Weights & Biases run; null: theirs.")
    progress_bar: Literal["auto", "on", "off"] = Field(default="auto", description="auto: on a terminal only.")
    style: Literal["sgt", "megatron"] = Field(
        default="sgt", description="Console line: short, or Megatron's for programs that parse it."
    )


class HuggingFaceConfig(Section):
    """Exports to Hugging Face, which tools/convert_to_hf.py makes of the run's checkpoints."""

    check_at_start: Literal["off", "warn", "error"] = Field(
        default="warn",
        description="Whether the start of a run says what of it no export can keep: the tokenizer, the kind of "
        "feed-forward layer. error: such a run does not start. Nothing is written, and no network is needed.",
    )
