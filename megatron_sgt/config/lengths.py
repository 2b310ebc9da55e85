"""How long the training sequences are in each step: a curriculum of lengths, a function of the step alone.

Samples stay sequences of ``model.seq_length`` tokens. While an entry asks for a shorter length, each of them is cut
into pieces of it (``data/pieces.py``), so that tokens per step and whatever counts samples stay as they are.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt

from pydantic import Field

from megatron_sgt.config.until import Until


class LengthEntry(Until):
    """One entry of the curriculum."""

    seq_length: int = Field(gt=1, description="Tokens per training sequence until then; divides model.seq_length.")


@dataclass(frozen=True)
class LengthSpan:
    """Applied steps ``first`` to ``last``, both inclusive, on sequences of ``seq_length`` tokens."""

    first: int
    last: int
    seq_length: int

    @property
    def steps(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class SequenceLengths:
    """Tokens per training sequence in each applied step, counted from 1.

    Attributes:
        full: ``model.seq_length``: of samples, of validation, and of all steps after the last entry.
        ends: the last step of each entry, ascending.
        shorter: the length of each entry.
    """

    full: int
    ends: tuple[int, ...] = ()
    shorter: tuple[int, ...] = ()

    @property
    def every(self) -> tuple[int, ...]:
        """All lengths that the run can meet, each once, ascending."""
        return tuple(sorted({self.full, *self.shorter}))

    def at(self, step: int) -> int:
        """The length in step ``step``."""
        return (*self.shorter, self.full)[bisect_left(self.ends, step)]

    def pieces_at(self, step: int) -> int:
        """Into how many pieces step ``step`` cuts a sample."""
        return self.full // self.at(step)

    def changes_at(self, step: int) -> bool:
        """Whether step ``step`` has another length than the one before it."""
        return step > 1 and self.at(step) != self.at(step - 1)

    def within(self, first: int, last: int) -> Iterator[LengthSpan]:
        """Steps ``first`` to ``last``, divided where an entry ends."""
        inner = [end for end in self.ends if first <= end < last]
        for begun, end in zip([first - 1, *inner], [*inner, last], strict=True):
            if begun < end:
                yield LengthSpan(begun + 1, end, self.at(end))

    def text(self) -> str:
        """The curriculum in words, as "512 until step 1,000, 1,024 until step 2,000, then 2,048"; empty without one."""
        entries = zip(self.shorter, self.ends, strict=True)
        said = [f"{length:,} until step {end:,}" for length, end in entries]
        return ", ".join([*said, f"then {self.full:,}"]) if said else ""


def check_lengths(
    lengths: SequenceLengths, tensor_parallel: int, sharer: str | None, names: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the rules that a curriculum breaks.

    Args:
        tensor_parallel: ranks that share the tokens of a sequence where ``sharer`` is not None.
        sharer: the setting that shares them.
        names: of the entries; none: they are those of data.seq_length_curriculum.
    """
    for number, (length, end) in enumerate(zip(lengths.shorter, lengths.ends, strict=True)):
        where = names[number] if names else f"data.seq_length_curriculum[{number}]"
        begun = lengths.ends[number - 1] if number else 0
        if end <= begun:
            yield f"{where}: ends at step {end:,}, which is not after step {begun:,} where it begins"
        if lengths.full % length:
            near = f"nearest that do: {_nearest(lengths.full, length)}"
            yield f"{where}.seq_length: {length} does not divide model.seq_length {lengths.full}; {near}"
        elif sharer is not None and length % tensor_parallel:
            yield (
                f"{where}.seq_length: {length} is not a multiple of tensor_model_parallel_size {tensor_parallel}, "
                f"which {sharer} needs"
            )


def _nearest(full: int, length: int) -> str:
    small = [n for n in range(1, isqrt(full) + 1) if full % n == 0]
    divisors = sorted({*small, *(full // n for n in small)} - {1})
    place = bisect_left(divisors, length)
    return ", ".join(map(str, divisors[max(0, place - 1) : place + 1]))
