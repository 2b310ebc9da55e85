"""What growth is to the rest of the project: a ``Schedule``, which is asked and never told apart by its name.

After every applied optimizer step training calls ``observe`` for each of ``wanted``, then ``after_step``, and executes
``plan`` from then on. Planning, reports, checkpoints and exports ask the same object what else they need to know.
The paper's rule is in sgt.py, those without growth in static.py, recorded ones in replay.py; methods.py chooses.
A rule of your own: docs/growth.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_sgt.config.base import Section
from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import ConfigError, DamagedCheckpointError
from megatron_sgt.growth.identity import check_identity
from megatron_sgt.growth.inherit import Inheritance
from megatron_sgt.growth.plan import GrowthEvent, LoopPlan

ENTROPY = "entropy"
"""Probe: attention entropies in [0, 1], [L, P, H]; pass 0 is the ordinary attention, P = 1 + ``max_loops``. The mean
over micro-batches and data-parallel ranks; 0 for passes that did not run."""
PROBES = frozenset({ENTROPY})
"""What training can observe."""


@dataclass(frozen=True)
class Stage:
    """From the step after ``step`` on, ``plan`` is executed. ``phase``: what planning calls it."""

    step: int
    phase: str
    plan: LoopPlan


class Schedule(ABC):
    """A rule of growth, and where it stands. Pure Python: no torch, no processes.

    Every method is deterministic, so ranks that observe the same hold the same plan.

    Attributes:
        name: what ``growth.method`` calls it. With ``version`` it is part of every checkpoint: raise the version when
            the rule decides otherwise than before, and old checkpoints are refused instead of continued differently.
        Options: settings that it takes below ``growth.options``, None for none; ``options`` holds them, validated.
        probes: what it may want to observe at some time (of ``PROBES``).
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    Options: ClassVar[type[Section] | None] = None

    def __init__(self, config: GrowthConfig, num_layers: int, num_heads: int) -> None:
        self.config = config
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.options: Any = None if self.Options is None else self.Options.model_validate(config.options or {})

    # Training

    @property
    @abstractmethod
    def plan(self) -> LoopPlan:
        """What the next forward pass must execute."""

    @abstractmethod
    def after_step(self, step: int) -> list[GrowthEvent]:
        """Act after the optimizer has applied step ``step`` (from 1); returns the decisions that it has taken."""

    @property
    def probes(self) -> frozenset[str]:
        """See the class. Default: nothing."""
        return frozenset()

    @property
    def wanted(self) -> frozenset[str]:
        """The probes that the next step must measure; from the step and past decisions alone. Default: all."""
        return self.probes

    def observe(self, probe: str, values: NDArray[np.float64]) -> None:
        """Take in what one step has measured while it executed ``plan``; see the probes above for the shape."""
        raise NotImplementedError(f"{self.name} asks for {probe} and has no method observe")

    def decides_at(self, step: int) -> bool:
        """Whether ``after_step(step)`` may decide from what was observed: then all ranks take rank 0's state before.

        From the step and past decisions alone, as ``wanted``: observed values may differ in their last bits between
        ranks, which must all come to the same collectives.
        """
        return bool(self.probes)

    # Planning

    @abstractmethod
    def final_plan(self, together: bool = False) -> LoopPlan:
        """The costliest structure after the last event. Head ids that depend on training are placeholders.

        Args:
            together: kept heads are neighbours, on one tensor-parallel rank if it has so many: the worst case of
                looping at their owners. Else they are apart, in key/value groups of their own.
        """

    def worst_case(self, last_step: int, together: bool = False) -> Iterator[Stage]:
        """The run from step 0 to ``last_step`` under the decisions that cost most.

        Default: a rule that observes nothing is run through; of one that observes, the final plan is assumed from
        the first step on. A rule whose plan is at times costlier than the final one must say so here.
        """
        if self.probes:
            yield Stage(0, self.name, self.final_plan(together))
            return
        trial = type(self)(self.config, self.num_layers, self.num_heads)
        yield Stage(0, trial.phase, trial.plan)
        for step in range(1, last_step + 1):
            if trial.after_step(step):
                yield Stage(step, trial.phase, trial.plan)

    @property
    def max_loops(self) -> int:
        """The largest K_l that a layer can get."""
        return max((layer.loops for layer in self.final_plan()), default=0)

    def advice(self, train_iters: int) -> Iterator[str]:
        """What a user should know before a run of ``train_iters`` steps, with the remedy. Default: nothing."""
        yield from ()

    # Reports and checkpoints

    @property
    def phase(self) -> str:
        return "growing" if self.plan.layers else "vanilla"

    @property
    def window_end(self) -> int | None:
        """The step at which gates that fade now will be 0; None while none do."""
        return None

    @property
    def acted_until(self) -> int | None:
        """The last step that it has acted after; None: it does not remember."""
        return None

    def selected_at(self) -> dict[int, int]:
        """Layer -> the step after which it was selected, in the order of selection; not of an imported model."""
        return {}

    def describe(self, added: str) -> str:
        """What grows and when, for people. ``added``: FLOPs of the final plan over vanilla's, as text."""
        return f"{self.name}, version {self.version}: at most {added}"

    def report(self) -> dict[str, Any]:
        """What every train record says of growth, beside phase and plan. JSON-able."""
        return {}

    def report_event(self, event: GrowthEvent) -> dict[str, Any]:
        """What the record of an event that was just taken says beside the event. JSON-able."""
        return {}

    def event(self, step: int, action: str, layer: int | None = None, score: float | None = None) -> GrowthEvent:
        """The event of a decision that ``plan`` contains already."""
        kept = {n: layer.kept_heads for n, layer in self.plan.layers if layer.loops}
        return GrowthEvent(step, action, layer, self.phase, kept, self.plan.loops, score)

    def identity(self) -> dict[str, Any]:
        """Which rule and which run the state belongs to. JSON-able."""
        config = self.config.model_dump(mode="json")
        if self.options is not None:
            config["options"] = self.options.model_dump(mode="json")
        return {
            "rule": self.name,
            "rule_version": self.version,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "config": config,
        }

    def progress(self) -> dict[str, Any]:
        """What ``restore`` needs to continue exactly. JSON-able; default: nothing."""
        return {}

    def restore(self, progress: Mapping[str, Any]) -> None:  # noqa: B027 - what keeps nothing restores nothing
        """Continue from ``progress()``. KeyError, TypeError and ValueError mean that it is damaged."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact: after load_state_dict the schedule continues as if never interrupted."""
        return {**self.identity(), **self.progress()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``.

        Raises:
            CheckpointError: the state belongs to another rule, model or configuration; names every difference.
            DamagedCheckpointError: it is damaged.
        """
        check_identity(state, self.identity())
        try:
            self.restore(state)
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            raise DamagedCheckpointError(f"growth state is damaged: {type(error).__name__}: {error}") from error

    # Models that have become larger

    def inherit(self, older: Schedule, grown: Inheritance) -> list[str]:
        """Go on where ``older`` stands, the schedule of the model before it got more layers or heads.

        Default: there is nothing to take over where a rule keeps nothing.

        Returns:
            What a user should know of it, one line each.

        Raises:
            ConfigError: it cannot go on in this model.
        """
        if older.progress():
            raise ConfigError(f"growth.method: {self.name} has no method inherit, so that its model cannot grow")
        return []

    def check_growth(self, step: int, grown: Inheritance) -> None:
        """Check, before a run, that its model may grow after ``step`` whatever is decided until then.

        ``inherit`` knows what was decided, and may refuse less. Default: a rule that keeps something must have it.

        Raises:
            ConfigError: see ``inherit``.
        """
        if type(self).inherit is Schedule.inherit:
            self.inherit(self, grown)

    # Given models: imported ones, those of other runs

    @classmethod
    def settings_for(cls, plan: LoopPlan, num_heads: int) -> dict[str, Any] | None:
        """A growth section under which this rule can have made ``plan``; None if it cannot. Default: it cannot."""
        return None

    def adopt(self, plan: LoopPlan) -> None:
        """Go on with ``plan``, in which an imported model, or another run's, has finished growing, and grow no further.

        Raises:
            ConfigError: this rule, under its settings, cannot have made ``plan``.
        """
        raise ConfigError(f"growth.method: is {self.name}, which cannot go on with loops of a given model")
