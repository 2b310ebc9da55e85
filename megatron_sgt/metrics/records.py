"""The fields of every kind of record: what a run writes to metrics.jsonl, and what the other writers show of it.

A record holds host numbers. ``step`` is always there; every other field may be absent, or None where nothing is known,
and is then not shown. Units are in the names: _s seconds, _gb 10^9 bytes. A test compares this with what a run writes.
A schedule of an installed package may add fields to train and growth records (growth/schedule.py: report).
"""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict


class _Step(TypedDict):
    step: int  # applied optimizer steps


class _Record(_Step, total=False):
    time: float  # seconds since 1970; the hub adds it


class Throughput(TypedDict):
    """Speed over the steps that a train record sums up."""

    tokens_per_second: float
    tokens_per_second_per_device: float
    tflops_per_device: float
    mfu: float | None  # fraction of the peak; None where the peak is unknown


class TrainRecord(_Record, Throughput, total=False):
    """The steps since the last train record: at every log interval, after every skipped step and at the end."""

    train_iters: int
    consumed_samples: int
    consumed_tokens: int
    global_batch_size: int
    loss: float  # mean of the steps
    grad_norm: float  # of the last step, before clipping
    lr: float
    loss_scale: float  # of the last step; fp16 only
    seq_length: int  # of the last step; with data.seq_length_curriculum only
    step_time_s: float  # from the end of a step to that of the next, without validation and saving, which have their
    # own records; without the first step of a process, unless it is alone
    first_step_s: float  # in the first record of a process: with what is compiled and allocated in that step
    model_flops_per_step: float  # of the method, loops included, recomputation not
    device: str  # "gpu" or "cpu": what the per-device figures are of
    memory_gb: float | None  # peak of this process, of rank 0's device (the first stage of a pipeline)
    memory_total_gb: float | None
    eta_s: float | None
    skipped_steps: int
    nan_steps: int  # 1 where the mean loss is not finite
    total_skipped_steps: int  # since the run began
    loops: int  # sum of K_l
    phase: str
    loop_depth: list[int]  # K_l by layer
    other_gates: dict[str, float]  # layer -> gate of the heads that it does not keep
    ema_entropy: list[list[float]]  # [layer][head], while the schedule measures it


MEASURED = (
    "loss",
    "grad_norm",
    "lr",
    "consumed_samples",
    "ema_entropy",
    "loop_depth",
    "other_gates",
    "phase",
)
"""Fields of a train record that a run determines: another run of the same configuration has the same, bit for bit."""


class SetRecord(TypedDict, total=False):
    """What a validation finds on one set."""

    loss: float
    perplexity: float
    bits_per_byte: float  # the loss of all tokens in bits, per byte of their text; with a tokenizer only
    ema_loss: float  # of the averaged weights, with train.ema_decay
    ema_perplexity: float
    ema_bits_per_byte: float
    samples: int  # sequences that were read
    samples_in_set: int
    tokens: int  # whose loss counts


class ValidRecord(_Record, total=False):
    """One validation, with the structure that inference uses. Losses are of the validation split, if there is one."""

    loss: float
    perplexity: float
    bits_per_byte: float
    ema_loss: float
    ema_perplexity: float
    ema_bits_per_byte: float
    sets: dict[str, SetRecord]  # those of data.valid
    batches: int  # micro-batches per rank, of all sets
    seconds: float


class TasksRecord(_Record, total=False):
    """Downstream tasks (evaluation.tasks), with the structure that inference uses."""

    results: dict[str, dict[str, float]]  # task -> metric -> value
    weights: str  # weights or average: which were measured
    failed: str  # instead of results: why there are none
    seconds: float


class GrowthRecord(_Record, total=False):
    """One decision of the schedule, and the structure after it (growth/plan.py:GrowthEvent)."""

    action: str
    layer: int | None  # selected or deepened; None where none was
    phase: str
    kept_heads: dict[str, list[int]]  # layer -> heads, of all layers selected so far
    loop_depth: list[int]  # K_l by layer
    layer_score: float | None  # mean entropy of the layer
    layer_rank: int  # of the layer among the selectable ones, 1 the highest score
    num_candidates: int  # selectable layers
    max_selected_layers: int
    fade_until_step: int  # end of the window
    flops_overhead: float  # fraction of vanilla's forward and backward, once the window is over
    ema_entropy: list[list[float]]  # [layer][head] that the decision was taken from


class LengthRecord(_Record, total=False):
    """The curriculum goes on to another sequence length after this step."""

    seq_length: int
    previous_seq_length: int
    sequences_per_step: int
    model_flops_per_step: float  # of the structure after this step


class PhaseRecord(_Record, total=False):
    """A phase of the run begins after this step, or a process starts within it."""

    number: int  # from 1
    name: str
    first_step: int
    last_step: int
    settings: list[str]  # what holds in it, in words


class GrowRecord(_Record, total=False):
    """A new stage: the model has become deeper or wider (stages/). The process that builds it writes it, each time."""

    stage: int  # that begins, from 1; the first one has no record
    operator: str
    options: dict[str, object]  # of the operator, as the configuration gives them
    moments: str
    optimizer: str
    lr_policy: str
    weights: str  # what the new model is made of: weights or ema
    preserves: bool  # whether it computes what the old one does
    layers: list[int]  # by new layer: the old one that it is a copy of
    heirs: list[int]  # by old layer: the new one that goes on looping if it did
    loop_depth: list[int]  # K_l by new layer
    kept_heads: dict[str, list[int]]  # new layer -> heads
    notes: list[str]  # what a user should know of the schedule
    sizes_before: dict[str, int]  # num_layers, hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups
    sizes_after: dict[str, int]
    parameters_before: int
    parameters_after: int
    flops_per_token_before: float  # forward and backward, with the loops of that moment
    flops_per_token_after: float
    probe_loss_before: float | None  # of the same sequences; None where this process has not seen the old model
    probe_loss_after: float
    consumed_samples: int
    consumed_tokens: int
    seconds: float  # from the end of the old stage to the first step of the new one, the save included


class SaveRecord(_Record, total=False):
    """A checkpoint that is whole."""

    path: Path | str
    seconds: float  # until it was whole
    stall_s: float  # of them, those in which training stood still
    bytes: int
    source_tokens: dict[str, int]  # by prefix of every source that the run has read: tokens
    source_epochs: dict[str, float | None]  # where the run stands in it; None where its length is not known
    asked: bool  # True: by --save-now


class SaveFailedRecord(_Record, total=False):
    """A checkpoint that could not be written: training continues, and saves at the next interval."""

    reason: str


class ResumeRecord(_Record, total=False):
    """The start of a process, or of training after a rollback: records of later steps before it are void."""

    path: Path | str | None  # None: a fresh start
    searched: Path | str  # where a checkpoint was looked for
    consumed_samples: int
    consumed_tokens: int
    skipped: tuple[str, ...] | list[str]  # damaged checkpoints that were passed over
    changed: tuple[str, ...] | list[str]  # settings unlike the checkpoint's: "train.train_iters 8 -> 12"
    origin: dict[
        str, int | str | None
    ]  # of a new run with the weights of another (checkpoint/new_run.py), where it begins


class DataRecord(_Record, total=False):
    """A resumed run reads its data in another order than before: what that means. Without counts where unknown."""

    line: str
    changed: tuple[str, ...] | list[str]
    tokens_again: int  # read before, and again before the new order's place is made good
    documents_again: int
    windows_again: int | None  # samples of the new order that hold such a token
    tokens_skipped: int  # not read, but taken for read
    documents_skipped: int
    exact: bool  # False: estimated from a sample of the documents
    held_out_trained: int  # documents held out before that are trained on
    trained_held_out: int


class RanksRecord(_Record, total=False):
    """How the ranks' own work compares. The last four fields: a rank that is newly found to hold up the others."""

    step_time_s: float
    work_s: list[float]  # by rank: median over steps of the timed part of its own work
    data_wait_s: list[float]  # by rank: mean over steps of its waiting for data
    lagging_rank: int
    host: str
    what: str  # "computing" or "waiting for data"
    excess: float  # fraction above the median rank


class RollbackRecord(_Record, total=False):
    """A loss spike, and the step from which the run continues."""

    path: Path | str | None  # None: no checkpoint to go back to, training goes on
    spike_step: int
    loss: float
    limit: float
    consumed_samples: int
    passed_samples: int  # samples that are never trained on


class StopRecord(_Record, total=False):
    """A request to stop that all ranks obey."""

    reason: str  # the signal, or the limit of time that was passed


class HookRecord(_Record, total=False):
    """What a user's hook reports."""

    hook: str  # its name
    values: dict[str, float]


class SummaryRecord(_Record, total=False):
    """The end of a process."""

    train_iters: int
    reason: str
    exit_code: int
    first_loss: float | None  # None where the run began at a checkpoint
    loss: float | None
    valid_loss: float | None
    valid_ema_loss: float  # of the averaged weights, with train.ema_decay
    valid_losses: dict[str, float]  # of the sets of data.valid
    growth_events: int
    seconds: float
    consumed_tokens: int
    tokens_per_second: float | None
    paths: dict[str, Path | str | None]


RECORDS: dict[str, type] = {
    "train": TrainRecord,
    "ranks": RanksRecord,
    "valid": ValidRecord,
    "tasks": TasksRecord,
    "growth": GrowthRecord,
    "length": LengthRecord,
    "phase": PhaseRecord,
    "grow": GrowRecord,
    "save": SaveRecord,
    "save_failed": SaveFailedRecord,
    "resume": ResumeRecord,
    "data": DataRecord,
    "rollback": RollbackRecord,
    "stop": StopRecord,
    "hook": HookRecord,
    "summary": SummaryRecord,
}
"""Every kind of record, and its fields."""
