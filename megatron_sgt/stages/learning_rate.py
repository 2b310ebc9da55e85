"""How the learning rate goes on in a stage, as a position on the run's curve. No torch.

    continue        the curve goes on as if nothing had happened
    rewarm(N)       the same curve, times k / N in step k of the stage, up to step N
    rewind(STEP)    the curve goes back to STEP, and what is left of it is stretched over the rest of the run, so that
                    it still ends where the decay ends (of WSD, what is left before the final decay is stretched, unless
                    that has begun)

G_stack's source warms up again (arXiv 2405.15319), MSG's goes back to the end of the warm-up (cofe-ai/MSG).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_sgt.config.base import shown
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.policy import name_and_number


@dataclass(frozen=True)
class RatePolicy:
    """``count``: the N of rewarm, the STEP of rewind."""

    kind: Literal["continue", "rewarm", "rewind"] = "continue"
    count: int = 0

    @classmethod
    def parse(cls, text: str) -> RatePolicy:
        """From "continue", "rewarm(100)" or "rewind(100)".

        Raises:
            ConfigError: it is none of them.
        """
        match name_and_number(text):
            case "continue", None:
                return cls()
            case "rewarm", int(count) if count > 0:
                return cls("rewarm", count)
            case "rewind", int(count) if count > 0:
                return cls("rewind", count)
        raise ConfigError(
            f"lr_policy {shown(text)}: must be continue, rewarm(N) or rewind(STEP), with a number above 0"
        )

    def __str__(self) -> str:
        return "continue" if self.kind == "continue" else f"{self.kind}({self.count})"

    def place(self, step: int, first: int, end: int) -> tuple[float, float]:
        """Where step ``step`` of the run, in a stage that began after step ``first``, lies on the curve.

        Args:
            end: step up to which a curve that has gone back is stretched.

        Returns:
            The step of the curve, which may lie between two, and a factor for the learning rate there.
        """
        if self.kind == "rewarm":
            return step, min(1.0, (step - first) / self.count)
        if self.kind == "rewind" and step < end:
            return self.count + (step - first) * (end - self.count) / (end - first), 1.0
        return step, 1.0
