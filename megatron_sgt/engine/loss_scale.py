"""fp16's dynamic loss scale: which skipped steps belong to the search for it, and which to a divergence.

DeepSpeed starts at a scale that is too large (2^16), skips every step whose scaled gradients overflow, and halves the
scale after the first ``hysteresis`` - 1 of them. Half a dozen steps are skipped in this way before the first one is
applied, and another one whenever the scale was doubled too far: nothing is wrong with the model. It diverges when
a step is skipped that a lower scale cannot mend.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler


def dynamic_scaler(engine: Any) -> DynamicLossScaler | None:
    """The engine's dynamic loss scale; None where there is none (fp32, bf16, a fixed scale)."""
    scaler = getattr(getattr(engine, "optimizer", None), "loss_scaler", None)
    return scaler if isinstance(scaler, DynamicLossScaler) else None


class SkipRule:
    """Counts the skipped steps in a row that the loss scale does not explain: ``unexplained``.

    A skipped step is explained when the scale that it was computed with could still fall, and every rank's loss was
    finite: a loss is computed before it is scaled. Reaching the smallest scale is no error here (for DeepSpeed it is);
    from there on every skipped step counts.
    """

    def __init__(self, engine: Any) -> None:
        self.unexplained = 0
        self._scaler = dynamic_scaler(engine)
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False
        self._could_fall = False

    def before_step(self) -> None:
        scaler = self._scaler
        self._could_fall = scaler is not None and scaler.cur_scale > scaler.min_scale

    @property
    def needs_loss(self) -> bool:
        """Whether the loss of the step decides, if it was skipped."""
        return self._could_fall

    def after_step(self, applied: bool, finite_loss: bool) -> None:
        if applied:
            self.unexplained = 0
        elif not (self._could_fall and finite_loss):
            self.unexplained += 1
