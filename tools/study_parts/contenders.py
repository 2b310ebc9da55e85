"""What a study compares: presets of one configuration file, and the orders that their sources report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron_sgt.config import Config
from megatron_sgt.config.presets import BASELINES
from study_parts.equal_flops import settings_of, stages_line
from study_parts.results import Claim

Loader = Callable[[str, tuple[str, ...]], Config]
"""The configuration of the study's file under a preset and settings over it."""


@dataclass(frozen=True)
class Contender:
    """One row of the table: a preset of the file, ``settings`` over both, and in a few words what it ``trains``."""

    preset: str
    settings: tuple[str, ...] = ()
    trains: str = ""


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        presets: that are compared; FLOPs are over those of the first.
        claims: what the sources report.
        equal_flops: whether every run is as long as the file's FLOPs allow, and not as long as the file says.
        terms: the end of the sentence that says what was trained, with the number of ``seeds``.
    """

    presets: tuple[str, ...]
    claims: tuple[Claim, ...]
    equal_flops: bool
    terms: str

    @property
    def baseline(self) -> str:
        return self.presets[0]

    def contenders(self, load: Loader, presets: tuple[str, ...]) -> list[Contender]:
        """Each of ``presets``.

        Raises:
            ConfigError: one is unknown, does not fit the file, or comes not near enough to the baseline's FLOPs.
        """
        if not self.equal_flops:
            return [Contender(preset) for preset in presets]
        found = []
        for preset in presets:
            settings = settings_of(partial(load, preset), load(self.baseline, ()), preset)
            found.append(Contender(preset, settings, stages_line(load(preset, settings))))
        return found


PAPER = Study(
    tuple(BASELINES),
    (
        Claim("SGT beats vanilla", "sgt", "vanilla"),
        Claim("SGT costs at most 3 % more FLOPs than vanilla", "sgt", "vanilla", 0.03),
        Claim("highest-entropy heads beat lowest-entropy heads", "sgt", "sgt-lowest-heads"),
        Claim("highest-entropy heads beat random heads", "sgt", "sgt-random-heads"),
        Claim("two heads beat all heads", "sgt", "sgt-all-heads"),
        Claim("deep to shallow beats shallow to deep", "sgt", "sgt-shallow-first"),
        Claim("SGT is at least as good as looping three whole blocks", "sgt", "block-loop-3"),
    ),
    equal_flops=False,
    terms="; seeds 1 to {seeds}, each with the same data order and initial weights for all presets.",
)
GROWING = Study(
    ("vanilla", "g-stack-2", "g-stack-4", "midas", "msg-ffn", "sgt", "sgt-g-stack-2"),
    (
        Claim("stacking twice beats training from scratch", "g-stack-2", "vanilla"),
        Claim("stacking four times beats training from scratch", "g-stack-4", "vanilla"),
        Claim("MIDAS beats training from scratch", "midas", "vanilla"),
        Claim("growing the feed-forward layers beats training from scratch", "msg-ffn", "vanilla"),
        Claim("stacking beats widening", "g-stack-4", "msg-ffn"),
        Claim("SGT beats training from scratch", "sgt", "vanilla"),
        Claim("SGT on top of stacking beats stacking", "sgt-g-stack-2", "g-stack-2"),
    ),
    equal_flops=True,
    terms=" from scratch (vanilla), for the others as many as cost the same FLOPs; seeds 1 to {seeds}, one data order "
    "each.",
)
"""Ways to one final model: from scratch, by models that become deeper or wider, by SGT, by both."""
