"""The optimizer and its learning-rate schedule."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron_sgt.config.base import Choice, Section


class OptimConfig(Section):
    """The optimizer and the learning-rate schedule. Steps are optimizer steps."""

    optimizer: Annotated[str, Choice("optimizers", ("adamw",))] = Field(
        default="adamw",
        description="Update rule. One of an installed package reads the settings of this section that it needs; "
        "planning and resharding know AdamW's state only.",
    )
    lr: float = Field(gt=0, description="Peak learning rate.")
    min_lr: float = Field(default=0.0, ge=0, description="Learning rate at and after the end of the decay.")
    lr_decay_style: Annotated[str, Choice("lr_schedules", ("cosine", "linear", "constant", "WSD"))] = Field(
        default="cosine",
        description="Curve from lr to min_lr; WSD: constant, then linear over the last lr_wsd_decay_iters.",
    )
    lr_warmup_iters: int = Field(
        default=0, ge=0, description="Steps over which the learning rate rises linearly to lr."
    )
    lr_decay_iters: int | None = Field(
        default=None,
        gt=0,
        description="Step (from 0, warm-up included) at which min_lr is reached; null: train_iters.",
    )
    lr_wsd_decay_iters: int | None = Field(default=None, gt=0, description="Steps of the final decay of WSD.")
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW's decoupled weight decay.")
    weight_decay_on: Literal["all", "matrices"] = Field(
        default="all",
        description="all: every parameter decays, as in the paper; matrices: norms and biases do not.",
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of AdamW's mean of gradients.")
    adam_beta2: float = Field(default=0.95, ge=0, lt=1, description="Decay of AdamW's mean of squared gradients.")
    adam_eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    clip_grad: float = Field(
        default=1.0,
        ge=0,
        description="Largest norm of the gradient over all parameters; a larger one is scaled down. 0: off.",
    )
    grad_accum_dtype: Literal["fp32", "model"] = Field(
        default="fp32",
        description="Type that the gradients of micro-batches are summed in; model: that of train.precision, which "
        "saves memory and loses digits of the sum (docs/layouts.md).",
    )
    grad_reduce_dtype: Literal["fp32", "model"] = Field(
        default="fp32",
        description="Type in which gradients travel between data-parallel ranks and are summed over them; model: that "
        "of train.precision, half the traffic under bf16 and fp16.",
    )

    def problems(self) -> Iterator[str]:
        if self.min_lr > self.lr:
            yield f"min_lr: {self.min_lr:g} is above lr {self.lr:g}"
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_iters is None:
            yield "lr_wsd_decay_iters: is required with lr_decay_style 'WSD'"
        if self.lr_decay_style != "WSD" and self.lr_wsd_decay_iters is not None:
            yield (
                f"lr_wsd_decay_iters: {self.lr_wsd_decay_iters} has no effect with lr_decay_style "
                f"'{self.lr_decay_style}'; remove it, or set lr_decay_style: WSD"
            )
