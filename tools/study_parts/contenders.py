"""What a study compares: names, what each changes in the configuration, and the orders that their sources report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_sgt.config import Config
from megatron_sgt.config.presets import PRESETS
from study_parts.results import Claim

Loader = Callable[[str, tuple[str, ...]], Config]
"""The configuration of the study's file under a preset and settings over it."""


@dataclass(frozen=True)
class Contender:
    """One row of the table: a preset over the file, and ``settings`` over both. ``about``: its stages, for people."""

    name: str
    preset: str
    settings: tuple[str, ...] = ()
    about: str = ""


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        baseline: the contender that FLOPs are compared with.
        names: of all contenders.
        claims: what the sources report.
        contenders: makes those of the given names, from the file's configuration.
        terms: the end of the sentence that says what was trained, with the number of ``seeds``.
    """

    baseline: str
    names: tuple[str, ...]
    claims: tuple[Claim, ...]
    contenders: Callable[[Loader, tuple[str, ...]], list[Contender]]
    terms: str


def _presets(load: Loader, names: tuple[str, ...]) -> list[Contender]:
    return [Contender(name, name) for name in names]


PAPER = Study(
    "vanilla",
    tuple(PRESETS),
    (
        Claim("SGT beats vanilla", "sgt", "vanilla"),
        Claim("SGT costs at most 3 % more FLOPs than vanilla", "sgt", "vanilla", 0.03),
        Claim("highest-entropy heads beat lowest-entropy heads", "sgt", "sgt-lowest-heads"),
        Claim("highest-entropy heads beat random heads", "sgt", "sgt-random-heads"),
        Claim("two heads beat all heads", "sgt", "sgt-all-heads"),
        Claim("deep to shallow beats shallow to deep", "sgt", "sgt-shallow-first"),
        Claim("SGT is at least as good as looping three whole blocks", "sgt", "block-loop-3"),
    ),
    _presets,
    "; seeds 1 to {seeds}, each with the same data order and initial weights for all presets.",
)
