"""How long a run may be that costs the FLOPs of another: of its whole length, planned over all stages.

Stages and the learning rate of a preset follow from train.train_iters, so that they stretch with it; the data goes on
behind that of the shorter run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.planning.stages import plan_stages
from megatron_sgt.stages.growth import sizes_of

TOLERANCE = 0.01
"""Of the FLOPs of a run."""
_LONGEST = 16
"""Times the length of the other."""
_UNITS = {
    "num_layers": "layers",
    "hidden_size": "channels",
    "ffn_hidden_size": "units",
    "num_attention_heads": "heads",
    "num_query_groups": "key/value heads",
}
"""Of the sizes that can grow."""


def run_flops(config: Config) -> int:
    """Model FLOPs of a whole run, planned: all stages, loops where the schedule's decisions cost most."""
    return sum(stage.flops for stage in plan_stages(config))


def settings_of(load: Callable[[tuple[str, ...]], Config], other: Config, name: str) -> tuple[str, ...]:
    """The settings with which ``load`` gives the run ``name`` that costs what ``other`` does.

    Raises:
        ConfigError: no number of steps comes near enough, or the learning rate would not follow it.
    """
    if (end := other.optim.lr_decay_iters) is not None:
        raise ConfigError(
            f"optim.lr_decay_iters {end:,}: runs of equal FLOPs have different lengths, to which the decay stretches; "
            "remove it"
        )

    def settings(steps: int) -> tuple[str, ...]:
        return f"train.train_iters={steps}", f"train.eval_interval={steps}"

    def cost(steps: int) -> int:
        return run_flops(load(settings(steps)))

    budget, length = run_flops(other), other.train.train_iters
    steps = _nearest(cost, budget, length // 2, _LONGEST * length)
    difference = cost(steps) / budget - 1
    if abs(difference) > TOLERANCE:
        raise ConfigError(
            f"train.train_iters: {length} are too few: {name} comes no nearer to their FLOPs than {difference:+.1%}; "
            "take more"
        )
    return settings(steps)


def _nearest(cost: Callable[[int], int], budget: int, low: int, high: int) -> int:
    """The number of steps from ``low`` to ``high`` whose ``cost``, which rises with it, is nearest to ``budget``."""
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) < budget else (low, middle)
    return min(low, high, key=lambda steps: abs(cost(steps) - budget))


def stages_line(config: Config) -> str:
    """The stages in a few words: what differs of the models, and how many steps each is trained."""
    stages = [one.stage for one in plan_stages(config)]
    models = [stage.config.model for stage in stages]
    sizes = [_sizes(model, models) for model in models]
    return ", ".join(f"{size}: {stage.last - stage.first:,}" for size, stage in zip(sizes, stages, strict=True))


def _sizes(model: ModelConfig, models: Sequence[ModelConfig]) -> str:
    """All sizes of ``model`` that differ among ``models``; of one that stays, its layers."""
    of = sizes_of(model)
    differ = [name for name in of if len({getattr(one, name) for one in models}) > 1] or ["num_layers"]
    if all(one.num_attention_heads == one.num_query_groups for one in models):
        differ = [name for name in differ if name != "num_query_groups"]
    return " / ".join(f"{of[name]} {_UNITS[name]}" for name in differ)
