"""The phases of a run: what changes between them, and which one each step belongs to. Pure.

What a phase does not set stays as the phase before it has it; the first one takes it from the sections.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from megatron_sgt.config.base import Choice, PathText
from megatron_sgt.config.batches import MOST_SIZES, Batches, BatchSpan, grain, ramp_over_samples, ramp_over_steps
from megatron_sgt.config.data import blend_texts
from megatron_sgt.config.lengths import SequenceLengths
from megatron_sgt.config.rotary import RotaryScaling
from megatron_sgt.config.until import Until

if TYPE_CHECKING:
    from megatron_sgt.config.root import Config

_Size = Annotated[int, Field(gt=0)]
RATE = ("lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "lr_wsd_decay_iters")
"""Settings with one of which a phase has a learning rate of its own."""


class PhaseConfig(Until):
    """One phase of the run. What it does not set stays as in the phase before; the first takes it from the sections."""

    name: str | None = Field(default=None, min_length=1, description="Shown in logs and reports; null: its number.")
    data_path: tuple[PathText, ...] | None = Field(
        default=None, description="Its blend, as data.data_path. Validation stays that of data.data_path."
    )
    global_batch_size: _Size | tuple[_Size, _Size] | None = Field(
        default=None,
        description="Sequences per optimizer step; [FIRST, LAST]: rises linearly in samples over the phase, rounded up "
        "to multiples of their greatest common divisor. Validation keeps train.global_batch_size.",
    )
    seq_length: int | None = Field(
        default=None,
        gt=1,
        description="Tokens per training sequence; divides model.seq_length, to which samples are cut from.",
    )
    rotary_base: float | None = Field(default=None, gt=0, description="As model.rotary_base.")
    rotary_scaling: RotaryScaling | None = Field(default=None, description="As model.rotary_scaling.")
    lr: float | None = Field(
        default=None,
        gt=0,
        description="Peak of a curve over the steps of this phase; null: where the learning rate is when it begins. "
        "With none of the lr settings the curve goes on that the phase before has.",
    )
    min_lr: float | None = Field(default=None, ge=0, description="Where that curve ends; null: optim.min_lr.")
    lr_decay_style: Annotated[str, Choice("lr_schedules", ("cosine", "linear", "constant", "WSD"))] | None = Field(
        default=None, description="Of that curve; null: optim.lr_decay_style."
    )
    lr_warmup_iters: int | None = Field(
        default=None,
        ge=0,
        description="Steps over which the learning rate rises linearly to lr from where it is when the phase begins; "
        "null: none, in the first phase optim.lr_warmup_iters.",
    )
    lr_wsd_decay_iters: int | None = Field(
        default=None, gt=0, description="Of a WSD curve; null: optim.lr_wsd_decay_iters."
    )

    @field_validator("data_path", mode="before")
    @classmethod
    def _as_texts(cls, value: Any) -> Any:
        return None if value is None else blend_texts(value)

    @field_validator("global_batch_size", mode="before")
    @classmethod
    def _one_or_two(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) != 2:
            raise ValueError(f"must be a number or [FIRST, LAST], got {list(value)}")
        return value

    @property
    def sets_rate(self) -> bool:
        """Whether it has a learning rate of its own."""
        return any(getattr(self, name) is not None for name in RATE)

    def problems(self) -> Iterator[str]:
        if self.until_steps is not None and self.until_tokens is not None:
            yield "until_steps: give it or until_tokens, and not both"
        if self.name is not None and not self.name.isprintable():
            yield f"name: {self.name!r} cannot be shown on one line"
        if not isinstance(self.global_batch_size, tuple):
            return
        low, high = self.global_batch_size
        if high <= low:
            yield f"global_batch_size: [{low}, {high}] does not rise; a constant one is a number"
        elif (sizes := (high - low) // grain(low, high)) > MOST_SIZES:
            yield (
                f"global_batch_size: [{low}, {high}] passes through {sizes:,} sizes, {MOST_SIZES:,} are possible; "
                "choose ends with a larger common divisor"
            )


@dataclass(frozen=True)
class Phase:
    """A phase with all that holds in it.

    Attributes:
        number: from 1.
        first, last: its steps, both inclusive.
        spans: their global batch sizes.
        settings: as they are written.
    """

    number: int
    first: int
    last: int
    spans: tuple[BatchSpan, ...]
    seq_length: int
    data_path: tuple[str, ...]
    rotary_base: float
    rotary_scaling: RotaryScaling | None
    settings: PhaseConfig

    @property
    def name(self) -> str:
        return self.settings.name or f"phase {self.number}"

    @property
    def where(self) -> str:
        """Its place in the configuration."""
        return f"phases[{self.number - 1}]"

    @property
    def steps(self) -> int:
        return self.last - self.first + 1

    @property
    def samples(self) -> int:
        return sum(span.samples for span in self.spans)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes of which every one in it is a multiple of their greatest common divisor."""
        asked = self.settings.global_batch_size
        return asked if isinstance(asked, tuple) else (self.spans[0].size,)

    @property
    def words(self) -> list[str]:
        """What holds in it, in words: batch and length, and of the rest what it sets."""
        entry, sizes = self.settings, dict.fromkeys((self.spans[0].size, self.spans[-1].size))
        said = [f"batch {' to '.join(f'{size:,}' for size in sizes)}", f"T {self.seq_length:,}"]
        if entry.sets_rate:
            peak = None if entry.lr is None else f"{entry.lr:g}"
            warmup = None if entry.lr_warmup_iters is None else f"warm-up {entry.lr_warmup_iters:,}"
            floor = None if entry.min_lr is None else f"to {entry.min_lr:g}"
            said.append(" ".join(part for part in ("lr", warmup, peak, entry.lr_decay_style, floor) if part))
        if entry.rotary_base is not None:
            said.append(f"rotary base {entry.rotary_base:g}")
        if entry.rotary_scaling is not None:
            said.append(f"rotary {entry.rotary_scaling.describe()}")
        if entry.data_path is not None:
            said.append(f"data {' '.join(entry.data_path)}")
        return said


def phases_of(config: "Config") -> tuple[Phase, ...]:
    """The phases of ``config``; none without the section. Their ends may be refused by ``check_phases``."""
    if not config.phases:
        return ()
    model, train = config.model, config.train
    start = (model.seq_length, config.data.data_path, model.rotary_base, model.rotary_scaling)
    return _resolved(config.phases, train.train_iters, train.global_batch_size, *start)


@lru_cache(maxsize=64)
def _resolved(
    entries: tuple[PhaseConfig, ...],
    train_iters: int,
    size: int,
    full: int,
    data_path: tuple[str, ...],
    base: float,
    scaling: RotaryScaling | None,
) -> tuple[Phase, ...]:
    phases: list[Phase] = []
    done, samples, length = 0, 0, full
    for number, entry in enumerate(entries, start=1):
        wanted = size if entry.global_batch_size is None else entry.global_batch_size
        first, tokens = done + 1, entry.until_tokens
        if tokens is not None:
            spans = tuple(_over_samples(wanted, first, -(-tokens // full) - samples))
            done = spans[-1].last if spans else done
        else:
            done = entry.until_steps or train_iters
            spans = tuple(_over_steps(wanted, first, done - first + 1))
        size = wanted if isinstance(wanted, int) else wanted[1]
        samples += sum(span.samples for span in spans)
        length, data_path = entry.seq_length or length, entry.data_path or data_path
        base, scaling = entry.rotary_base or base, entry.rotary_scaling or scaling
        phases.append(Phase(number, first, done, spans, length, data_path, base, scaling, entry))
    return tuple(phases)


def _over_steps(wanted: int | tuple[int, int], first: int, steps: int) -> Iterator[BatchSpan]:
    """``steps`` steps from ``first`` on; none where that is not above 0."""
    if steps > 0:
        yield from _one_after_the_other(
            first, [(steps, wanted)] if isinstance(wanted, int) else ramp_over_steps(*wanted, steps)
        )


def _over_samples(wanted: int | tuple[int, int], first: int, samples: int) -> Iterator[BatchSpan]:
    """As many steps from ``first`` on as take ``samples`` samples; none where that is not above 0."""
    if samples > 0:
        whole = [(-(-samples // wanted), wanted)] if isinstance(wanted, int) else ramp_over_samples(*wanted, samples)
        yield from _one_after_the_other(first, whole)


def _one_after_the_other(first: int, parts: Iterable[tuple[int, int]]) -> Iterator[BatchSpan]:
    for steps, size in parts:
        yield BatchSpan(first, first + steps - 1, size)
        first += steps


def phases_text(config: "Config") -> str:
    """All phases in one line."""
    said = (f"{one.name} until step {one.last:,} ({', '.join(one.words)})" for one in phases_of(config))
    return "; ".join(said) or "none"


def batches_of(config: "Config") -> Batches:
    """The global batch size of every step of ``config``."""
    spans = tuple(span for phase in phases_of(config) for span in phase.spans)
    return Batches(spans or (BatchSpan(1, config.train.train_iters, config.train.global_batch_size),))


def lengths_of(config: "Config") -> SequenceLengths | None:
    """The length of the sequences of every step, where a phase of ``config`` sets one."""
    phases = phases_of(config)
    if not any(phase.settings.seq_length for phase in phases):
        return None
    ends, lengths = [phase.last for phase in phases], [phase.seq_length for phase in phases]
    while lengths and lengths[-1] == config.model.seq_length:
        ends.pop(), lengths.pop()
    return SequenceLengths(config.model.seq_length, tuple(ends), tuple(lengths))


def check_phases(config: "Config") -> Iterator[str]:
    """Yield the rules that the phases break, alone and with other sections."""
    if not config.phases:
        return
    end, names = config.train.train_iters, [phase.name for phase in phases_of(config)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield f"phases: {', '.join(map(repr, twice))} is the name of more than one phase"
    for phase, entry in zip(phases_of(config), config.phases, strict=True):
        where, final = phase.where, phase.number == len(config.phases)
        if not final and entry.until_steps is None and entry.until_tokens is None:
            yield f"{where}.until_steps: is required, or until_tokens; only the last phase ends with the run"
            return
        if phase.last < phase.first:
            yield f"{where}: ends at step {phase.last:,}, which is not after step {phase.first - 1:,} where it begins"
            return
        if phase.last > end or (phase.last == end and not final):
            yield f"{where}: ends at step {phase.last:,}, but the run at train.train_iters {end:,}; let it end earlier"
            return
        if final and phase.last < end:
            yield (
                f"{where}: the last phase ends at step {phase.last:,}, but the run at train.train_iters {end:,}; leave "
                "out its end, or set train.train_iters to it"
            )
        yield from (f"{where}.{line}" for line in _misfits(config, phase))
    for other, used in (
        ("growth.stages", config.growth.stages),
        ("data.seq_length_curriculum", config.data.seq_length_curriculum),
    ):
        if used:
            remedy = "give phases a seq_length" if other.startswith("data") else "leave one of them out"
            yield f"phases: cannot be used together with {other}; {remedy}"


def _misfits(config: "Config", phase: Phase) -> Iterator[str]:
    """What of ``phase`` does not fit the other sections."""
    entry, micro = phase.settings, config.train.micro_batch_size
    sizes = entry.global_batch_size if isinstance(entry.global_batch_size, tuple) else (entry.global_batch_size,)
    for size in sizes:
        if size is not None and size % micro:
            yield f"global_batch_size: {size} is not a multiple of train.micro_batch_size {micro}"
    if entry.data_path is not None:
        if not entry.data_path:
            yield "data_path: is empty; leave it out to go on with the blend before"
        elif config.data.dataset != "indexed":
            yield f"data_path: has no effect with data.dataset '{config.data.dataset}'; remove it"
        yield from config.data.model_copy(update={"data_path": entry.data_path}).problems()
    positions = {"rotary_base": phase.rotary_base, "rotary_scaling": phase.rotary_scaling}
    if entry.rotary_base is not None or entry.rotary_scaling is not None:
        model = config.model.model_copy(update=positions)
        yield from (line for line in model.problems() if line.startswith("rotary"))
    yield from _rate_misfits(config, phase)


def _rate_misfits(config: "Config", phase: Phase) -> Iterator[str]:
    entry, optim = phase.settings, config.optim
    if not entry.sets_rate:
        return
    style = entry.lr_decay_style or optim.lr_decay_style
    decay = entry.lr_wsd_decay_iters or optim.lr_wsd_decay_iters
    warmup = (
        (optim.lr_warmup_iters if phase.number == 1 else 0) if entry.lr_warmup_iters is None else entry.lr_warmup_iters
    )
    if entry.lr is not None and entry.min_lr is not None and entry.min_lr > entry.lr:
        yield f"min_lr: {entry.min_lr:g} is above lr {entry.lr:g}"
    if entry.lr_wsd_decay_iters is not None and style != "WSD":
        yield f"lr_wsd_decay_iters: {entry.lr_wsd_decay_iters} has no effect with lr_decay_style '{style}'; remove it"
    if style == "WSD" and decay is None:
        yield "lr_wsd_decay_iters: is required with lr_decay_style 'WSD'"
    elif style == "WSD" and decay is not None and warmup + decay > phase.steps:
        yield f"lr_wsd_decay_iters: {decay} and lr_warmup_iters {warmup} do not fit into its {phase.steps:,} steps"
    elif warmup > phase.steps:
        yield f"lr_warmup_iters: {warmup} is above its {phase.steps:,} steps"
