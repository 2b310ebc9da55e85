"""How depth grows: the schedule of the Sparse Growing Transformer, its ablations and baselines."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from megatron_sgt import extensions
from megatron_sgt.config.base import MOST_SEED, Choice, PathText, Section, shown
from megatron_sgt.config.problems import explain
from megatron_sgt.config.until import Until
from megatron_sgt.errors import ConfigError

METHODS = ("sgt", "vanilla", "block_loop")
"""The built-in ones."""


class StageConfig(Until):
    """The end of a stage of the run, and how the model grows there."""

    operator: str = Field(description="How it grows: `g_stack`, `midas`, `msg`, ... (growing.md).")
    options: dict[str, Any] = Field(default_factory=dict, description="Settings of the operator.")
    moments: Literal["copy", "scaled", "seeded", "fresh"] | None = Field(
        default=None, description="What becomes of AdamW's moments (growing.md); null: as in the operator's source."
    )
    optimizer: str | None = Field(
        default=None,
        description="What becomes of AdamW's step: `continue`, `rewind(N)` or `fresh`; null: as in the operator's "
        "source.",
    )
    lr_policy: str = Field(
        default="continue",
        description="Learning rate of the new stage: `continue`; `rewarm(N)`: rises again over N steps; "
        "`rewind(STEP)`: goes back to that of STEP, and the rest of the curve is stretched over the rest of the run "
        "(of WSD, what comes before the final decay).",
    )
    weights: Literal["weights", "ema"] = Field(
        default="weights", description="What the new model is made of: the weights, or their average (train.ema_decay)."
    )


class RampConfig(Section):
    """Layers and feed-forward units that are faded in, as a growth with ``ramp_steps`` writes it; not set by hand."""

    first: int = Field(ge=0, description="Applied steps of the run when they were added.")
    steps: int = Field(gt=0, description="Applied steps over which their mask rises from 0 to 1.")
    layers: tuple[int, ...] = Field(default=(), description="The new layers.")
    old_units: int | None = Field(
        default=None, gt=0, description="Units of every feed-forward layer that are not new; null: all of them."
    )

    @property
    def end(self) -> int:
        """Applied steps after which the mask is 1."""
        return self.first + self.steps

    def problems(self) -> Iterator[str]:
        if not self.layers and self.old_units is None:
            yield "layers: nothing is faded in; a ramp is written by growth (growing.md), remove it"
        if len(set(self.layers)) != len(self.layers):
            yield f"layers: names a layer twice: {list(self.layers)}"

    def misfits(self, num_layers: int, width: int) -> Iterator[str]:
        """Why it is not the ramp of a model with so many layers, whose feed-forward layers have ``width`` units."""
        outside = [layer for layer in self.layers if not 0 <= layer < num_layers]
        if outside:
            yield f"layers: {outside} outside the model's layers 0..{num_layers - 1}"
        elif len(self.layers) >= num_layers:
            yield f"layers: names all {num_layers} layers of the model, of which some must be old"
        if self.old_units is not None and self.old_units >= width:
            yield f"old_units: {self.old_units} leaves no new ones of model.ffn_hidden_size {width}"


class GrowthConfig(Section):
    """The growth method and its schedule. Defaults are those of the paper (arXiv 2603.23998)."""

    method: Annotated[str, Choice("schedules", METHODS)] = Field(
        default="sgt",
        description="`sgt`: attention loops grow during training; `vanilla`: no loop at all; "
        "`block_loop`: whole layers are executed again from the first step (the paper's baseline); or a schedule "
        "that an installed package registers (growth.md).",
    )
    options: dict[str, Any] | None = Field(
        default=None, description="Settings of a registered schedule; the built-in methods take none."
    )
    first_selection_step: int = Field(default=250, gt=0, description="Optimizer step (from 1) of the first selection.")
    window_size: int = Field(
        default=250,
        gt=0,
        description="Steps over which the heads that are not kept fade out; also the least time between two decisions.",
    )
    top_k_layers: int = Field(default=3, gt=0, description="Layers of highest entropy that a decision considers.")
    max_selected_layers: int = Field(default=3, gt=0, description="Layers that may loop in the end.")
    max_loop_depth: int = Field(
        default=1, gt=0, le=1000, description="Most additional attention passes of one layer (K_max)."
    )
    num_keep_heads: int = Field(default=2, gt=0, description="Heads that go on looping in a selected layer.")
    decay_type: Literal["linear", "cosine", "exponential"] = Field(
        default="linear",
        description="Curve on which the gates of the other heads fade from 1 to 0 over the window.",
    )
    ema_decay: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Weight of the past in the running mean of the entropies; 0: the last value.",
    )
    exclude_layers: tuple[int, ...] = Field(
        default=(0,), description="Layers (from 0, next to the embedding) that are never selected."
    )
    direction: Literal["deep_to_shallow", "shallow_to_deep"] = Field(
        default="deep_to_shallow", description="Order in which layers are selected."
    )
    head_choice: Literal["highest", "lowest", "random", "all"] = Field(
        default="highest",
        description="Which heads of a selected layer are kept, by their entropy; all: every head.",
    )
    seed: int = Field(default=0, ge=0, le=MOST_SEED, description="Seed of head_choice random.")
    entropy_min_document_tokens: int = Field(
        default=2,
        ge=2,
        description="Tokens of the last document of a sequence from which on the entropy of its last row counts; below "
        "they see too little. Read where samples say where documents begin (growth.md).",
    )
    entropy_after_fixed: bool = Field(
        default=False, description="Go on measuring entropy once the structure is fixed (monitoring only)."
    )
    exact_ema: bool = Field(
        default=True,
        description="Measure entropy in every step before the structure is fixed; false: only in the last steps "
        "before a decision, whose outcome the earlier ones can no longer change in fp32.",
    )
    replay: PathText | None = Field(
        default=None,
        description="Repeat the decisions of this recorded run (its metrics.jsonl, or a JSON list of growth events) "
        "instead of measuring and deciding; null: decide.",
    )
    block_loop_layers: tuple[int, ...] = Field(default=(), description="Layers that block_loop executes again.")
    block_loop_count: int = Field(
        default=1, gt=0, le=1000, description="Additional executions of each of block_loop_layers."
    )

    stages: tuple[StageConfig, ...] = Field(
        default=(),
        description="Stages of a model that becomes deeper or wider while it trains: `model` is that of the first, and "
        "each entry ends a stage (growing.md). Empty: the shape stays.",
    )
    ramp: RampConfig | None = Field(
        default=None,
        description="What a growth fades into the model (`msg` with `ramp_steps`); null: nothing. Derived: written "
        "into the configuration of a stage, or of a grown checkpoint.",
    )

    def problems(self) -> Iterator[str]:
        yield from self._method_problems()
        for name in ("exclude_layers", "block_loop_layers"):
            layers: tuple[int, ...] = getattr(self, name)
            if len(set(layers)) != len(layers):
                yield f"{name}: names a layer twice: {list(layers)}"
        if self.replay is not None and self.method != "sgt":
            yield f"replay: has no effect with method '{self.method}'; remove it, or set method: sgt"
        if self.method == "block_loop" and not self.block_loop_layers:
            yield "block_loop_layers: is empty with method 'block_loop'; name the layers, e.g. [5, 6, 7]"
        if self.method != "block_loop" and self.block_loop_layers:
            yield (
                f"block_loop_layers: {list(self.block_loop_layers)} has no effect with method "
                f"'{self.method}'; remove it, or set method: block_loop"
            )

    def _method_problems(self) -> Iterator[str]:
        """What is wrong with the schedule that the method names, or with its options."""
        options = None
        if self.method not in METHODS:
            try:
                options = getattr(extensions.load("schedules", self.method), "Options", None)
            except ConfigError as error:
                yield f"method: {error}"
                return
        if options is None:
            if self.options:
                yield f"options: {shown(self.options)} has no effect with method '{self.method}'; remove it"
            return
        try:
            options.model_validate(self.options or {})
        except ValidationError as error:
            for line in explain(error, options):
                yield f"options: {line}" if line.startswith("unknown key") else f"options.{line}"
