"""What becomes of AdamW's step and moments when a model grows. No torch.

A master has one step for all its entries (ZeRO keeps many parameters in one), so new entries cannot have one of their
own. With zero moments and an inherited step, the bias corrections are over and the first updates are too large: for a
constant gradient, after 2000 steps and with beta1 0.9, by up to

    beta2   0.999   0.99   0.98   0.95
    times   6.11    2.13   1.55   1.10     of the learning rate

Two remedies work after any number of steps. ``rewind(n)`` sets the step to n and multiplies kept moments by
(1 - beta^n) / (1 - beta^step), so that kept entries go on with exactly the update that they had, and new ones make at
most 1.12 times the learning rate for the default n of 10 (1.26 for 20, 1.64 for 50, 2.15 for 100 at beta2 0.999).
Moments ``seeded`` give new entries the mean of their tensor's exp_avg_sq, so that
their updates rise from 0.10 to 1.00. A step of 0 under kept moments would be a third (2.24 times): it is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_sgt.config.base import shown
from megatron_sgt.config.optim import OptimConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.policy import name_and_number

MomentRule = Literal["copy", "scaled", "fresh", "seeded"]
MOMENT_RULES: dict[str, str] = {
    "copy": "those of the entry's source, new entries zero",
    "scaled": "the same, in proportion to the gradients that the growth leaves to copies",
    "seeded": "as scaled, and new entries begin with their tensor's mean exp_avg_sq",
    "fresh": "all zero",
}
SAFE_BETA2 = 0.98
"""Up to this, new entries may begin with zero moments at a late step: at most 1.55 times the learning rate."""
SAFE_STEP = 20
"""Up to this, new entries may begin with zero moments at any beta2: at most 1.26 times the learning rate."""
REWOUND_STEP = 10


@dataclass(frozen=True)
class OptimizerPolicy:
    """``continue``: the step stays; ``rewind``: it becomes ``step``; ``fresh``: 0, without moments."""

    kind: Literal["continue", "rewind", "fresh"]
    step: int = 0

    @classmethod
    def parse(cls, text: str) -> OptimizerPolicy:
        """From "continue", "fresh", "rewind" or "rewind(20)".

        Raises:
            ConfigError: it is none of them.
        """
        match name_and_number(text):
            case "continue", None:
                return cls("continue")
            case "fresh", None:
                return cls("fresh")
            case "rewind", None:
                return cls("rewind", REWOUND_STEP)
            case "rewind", int(step) if step > 0:
                return cls("rewind", step)
        raise ConfigError(f"optimizer {shown(text)}: must be continue, rewind, rewind(N) with N above 0, or fresh")

    def __str__(self) -> str:
        return f"rewind({self.step})" if self.kind == "rewind" else self.kind


@dataclass(frozen=True)
class Carried:
    """What goes on of AdamW: its ``step``, and kept moments times ``exp_avg`` and ``exp_avg_sq``.

    ``moments``: how those of a grown tensor follow from those of its source, "fresh": there are none.
    """

    step: int
    moments: MomentRule
    exp_avg: float = 1.0
    exp_avg_sq: float = 1.0

    @property
    def keeps_moments(self) -> bool:
        return self.moments != "fresh"


def carry(step: int, policy: OptimizerPolicy, moments: str, optim: OptimConfig, new_entries: bool) -> Carried:
    """Decide what goes on after ``step`` updates; ``new_entries``: some entries of the grown model have no source.

    Raises:
        ConfigError: the two do not go together, or new entries would make updates that are far too large.
    """
    rule = _rule(moments)
    if step == 0 or policy.kind == "fresh":
        if step and rule != "fresh":
            raise ConfigError(
                f"optimizer fresh with moments {rule}: a step of 0 under kept moments makes updates of twice the "
                "learning rate; choose moments fresh, or optimizer rewind"
            )
        return Carried(0, "fresh")
    zeros = rule == "fresh" or (new_entries and rule != "seeded")
    if policy.kind == "continue":
        if zeros and optim.adam_beta2 > SAFE_BETA2:
            raise ConfigError(
                f"optimizer continue with moments {rule}: at step {step} and optim.adam_beta2 {optim.adam_beta2:g}, "
                "entries without moments would be updated by several times the learning rate; choose optimizer rewind, "
                "or moments seeded"
            )
        return Carried(step, rule)
    kept = min(policy.step, step)
    if zeros and optim.adam_beta2 > SAFE_BETA2 and kept > SAFE_STEP:
        raise ConfigError(
            f"optimizer {policy} with moments {rule}: at step {kept} and optim.adam_beta2 {optim.adam_beta2:g}, "
            "entries without moments would be updated by too much; choose optimizer "
            f"rewind({REWOUND_STEP}), or moments seeded"
        )
    return Carried(kept, rule, _correction(optim.adam_beta1, kept, step), _correction(optim.adam_beta2, kept, step))


def _rule(text: str) -> MomentRule:
    for rule in ("copy", "scaled", "fresh", "seeded"):
        if text == rule:
            return rule
    raise ConfigError(f"moments {text!r}: must be one of {', '.join(MOMENT_RULES)}")


def _correction(beta: float, now: int, before: int) -> float:
    """By how much a moment is multiplied so that its bias-corrected value is the same at step ``now``."""
    return (1 - beta**now) / (1 - beta**before)
