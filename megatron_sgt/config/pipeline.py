"""Which layers each stage of a pipeline holds, and the notations for it.

A *stage* here is the share of the model that the ranks of one pipeline-parallel rank hold (a stage of a run in which
the model grows is another thing: ``megatron_sgt.stages``). With a virtual size V it consists of V *chunks*; a
micro-batch passes chunk 0 of every stage, then chunk 1 of every stage, and so on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from megatron_sgt.config.base import shown

AUTO = "auto"
LayoutSetting: TypeAlias = str | tuple[int, ...] | tuple[tuple[str, ...], ...]
"""``auto``; Megatron-Core's string or list of lists; or the number of layers of every chunk."""
_LETTERS = {"E": "embedding", "t": "decoder", "L": "loss"}
_COUNTS = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})*")
MOST_LETTERS = 100_000
"""Of a written layout, repetitions included: more are a mistake, which would cost minutes or all memory to read."""


@dataclass(frozen=True)
class PipelineLayout:
    """A model's layers, cut into the chunks of a pipeline.

    Attributes:
        size: stages.
        counts: layers of every chunk in the order of the model; entry v · size + p is chunk v of stage p, which is
            Megatron-Core's order. The embedding is in the first chunk, last norm and output layer in the last.
    """

    size: int
    counts: tuple[int, ...]

    @property
    def virtual_size(self) -> int:
        """Chunks of every stage."""
        return len(self.counts) // self.size

    @property
    def num_layers(self) -> int:
        return sum(self.counts)

    def chunks(self, stage: int) -> tuple[range, ...]:
        """The layers of every chunk of ``stage``, by their numbers in the whole model."""
        ends = [sum(self.counts[: n + 1]) for n in range(len(self.counts))]
        return tuple(range(ends[n] - self.counts[n], ends[n]) for n in range(stage, len(self.counts), self.size))

    def layers(self, stage: int) -> tuple[int, ...]:
        """All layers of ``stage``, shallow to deep."""
        return tuple(layer for chunk in self.chunks(stage) for layer in chunk)

    def stage_of(self, layer: int) -> int:
        """The stage that holds ``layer``."""
        return next(stage for stage in range(self.size) if layer in self.layers(stage))

    def megatron(self) -> list[list[str]]:
        """Megatron-Core's ``pipeline_model_parallel_layout``."""
        rows = [["decoder"] * number for number in self.counts]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        return rows

    def __str__(self) -> str:
        """As ``parse_layout`` reads it: layers of every chunk."""
        return ",".join(map(str, self.counts))


def read_layout(value: Any) -> LayoutSetting:
    """What a configuration gives for a layout, lists as tuples; whether it adds up is another question.

    Raises:
        ValueError: it is none of the notations.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and value:
        if all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value):
            return tuple(value)
        rows = [tuple(row) for row in value if isinstance(row, list | tuple)]
        if len(rows) == len(value) and all(isinstance(name, str) for row in rows for name in row):
            return tuple(rows)
    raise ValueError(
        "must be auto, Megatron-Core's string such as 'Et*3|tt|tL' or its list of lists, or the number of layers of "
        f"every part such as [3, 2, 1], got {shown(value)}"
    )


def parse_layout(setting: LayoutSetting, size: int, virtual_size: int, num_layers: int) -> PipelineLayout:
    """Read any notation but ``auto``.

    Args:
        setting: Megatron-Core's string (``Et*3|tt|tt|tL``; E embedding, t a layer, L output, ``x*3`` or ``(..)*3``
            repeated) or list of lists (embedding, decoder, loss); or the number of layers of every chunk, as a
            list or as text (``1,2,2,1``).
        size: stages. virtual_size: chunks of every stage. num_layers: of the model.

    Raises:
        ValueError: what does not add up, with the numbers.
    """
    if len(setting) > MOST_LETTERS:
        raise ValueError(f"it is longer than {MOST_LETTERS:,}")
    if isinstance(setting, str) and _COUNTS.fullmatch(setting.strip()):
        setting = tuple(int(number) for number in setting.split(","))
    if isinstance(setting, str):
        counts = _counts_of(_rows(setting))
    elif all(isinstance(entry, int) for entry in setting):
        counts = tuple(entry for entry in setting if isinstance(entry, int))
    else:
        counts = _counts_of([[*entry] for entry in setting if not isinstance(entry, int)])
    wanted = size * virtual_size
    if len(counts) != wanted:
        each = f"{size} stages" if virtual_size == 1 else f"{size} stages x {virtual_size} chunks = {wanted}"
        raise ValueError(f"it has {len(counts)} parts for {each}")
    if empty := [number for number, count in enumerate(counts) if count < 1]:
        raise ValueError(f"part {empty[0]} has no layer; every part needs one")
    if sum(counts) != num_layers:
        raise ValueError(
            f"its parts hold {' + '.join(map(str, counts))} = {sum(counts)} layers, the model {num_layers}"
        )
    return PipelineLayout(size, counts)


def even_layout(size: int, virtual_size: int, num_layers: int) -> PipelineLayout:
    """Parts of equal size, the first ones with a layer more where it does not divide."""
    parts = size * virtual_size
    whole, rest = divmod(num_layers, parts)
    return PipelineLayout(size, tuple(whole + (part < rest) for part in range(parts)))


def _rows(text: str) -> list[list[str]]:
    """Megatron-Core's string as a list of parts."""
    flat = re.sub(r"[\s,]", "", text)
    for repeated in (r"\(([^()]*)\)\*([0-9]+)", r"([A-Za-z])\*([0-9]+)"):
        while found := re.findall(repeated, flat):
            if len(flat) + sum(len(part) * _times(number) for part, number in found) > MOST_LETTERS:
                raise ValueError(f"it is longer than {MOST_LETTERS:,} with its repetitions")
            flat = re.sub(repeated, lambda match: match[1] * _times(match[2]), flat)
    rows = [list(part) for part in flat.split("|")]
    if strange := sorted({letter for row in rows for letter in row} - set(_LETTERS)):
        raise ValueError(f"{strange[0]!r} is none of E (embedding), t (a layer), L (output), | * ( )")
    return [[_LETTERS[letter] for letter in row] for row in rows]


def _times(number: str) -> int:
    if len(number) > 4:
        raise ValueError(f"it repeats something {number} times")
    return int(number)


def _counts_of(rows: Sequence[Sequence[str]]) -> tuple[int, ...]:
    if strange := sorted({str(name) for row in rows for name in row} - set(_LETTERS.values())):
        raise ValueError(f"{strange[0]!r} is none of embedding, decoder, loss")
    flat = [name for row in rows for name in row]
    inner = flat[1:-1]
    if not flat or flat[0] != "embedding" or flat[-1] != "loss" or {*inner} - {"decoder"} or len(flat) < 2:
        raise ValueError("it must begin with the embedding, end with the output (loss), and have both once")
    return tuple(list(row).count("decoder") for row in rows)
