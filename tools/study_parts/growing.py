"""Ways to the same final model at equal FLOPs: from scratch, by models that become deeper or wider, and by SGT.

The file's own run, without growth, is the budget. Every other contender ends with the same model and is given as many
steps as bring the FLOPs of its whole run, the planned ones of all stages together, nearest to that; its stages end at
fixed shares of these steps, and its learning rate decays over them. Its data goes on where the file's run would have
stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_sgt.config import Config
from megatron_sgt.errors import ConfigError
from megatron_sgt.planning.stages import plan_stages
from study_parts.contenders import Contender, Loader, Study
from study_parts.results import Claim

TOLERANCE = 0.01
"""Of the FLOPs of a run, from those of the budget."""
_MOST_STEPS = 16
"""Times those of the budget: the smallest first stage costs a sixteenth of the final model, or more."""

Stages = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """``first``: what of the final model the first stage has instead; ``stages``: from that and a number of steps."""

    preset: str
    first: Callable[[Config], dict[str, int]] = lambda final: {}
    stages: Callable[[Config, int], Stages] = lambda final, steps: []


def _share(steps: int, share: float) -> int:
    return max(1, round(share * steps))


def _g_stack(factor: int, preset: str = "vanilla") -> Method:
    """Once, after a tenth of the steps: the source's law for this moment does not reach down to such models."""

    def stages(final: Config, steps: int) -> Stages:
        again = {"lr_policy": f"rewarm({final.optim.lr_warmup_iters})"} if final.optim.lr_warmup_iters else {}
        return [
            {"until_steps": _share(steps, 0.1), "operator": "g_stack", "options": {"factor": factor}, **again},
        ]

    return Method(preset, lambda final: {"num_layers": final.model.num_layers // factor}, stages)


def _midas(blocks: int, alpha: int = 2) -> Method:
    """From one block to all: stage i of k has i^alpha of sum(j^alpha) shares of the steps (Prop-alpha)."""
    whole = sum(i**alpha for i in range(1, blocks + 1))
    ends = [sum(i**alpha for i in range(1, k + 1)) / whole for k in range(1, blocks)]

    def stages(final: Config, steps: int) -> Stages:
        grow = {"operator": "midas", "options": {"block_size": final.model.num_layers // blocks}}
        return [{"until_steps": _share(steps, end), **grow} for end in ends]

    return Method("vanilla", lambda final: {"num_layers": final.model.num_layers // blocks}, stages)


def _msg_ffn() -> Method:
    """From a quarter of the feed-forward units, as the source's base model, to all of them, after a quarter."""

    def stages(final: Config, steps: int) -> Stages:
        back = {"lr_policy": f"rewind({final.optim.lr_warmup_iters})"} if final.optim.lr_warmup_iters else {}
        options = {"ffn_hidden_size": final.model.ffn_hidden_size}
        return [{"until_steps": _share(steps, 0.25), "operator": "msg", "options": options, **back}]

    return Method("vanilla", lambda final: {"ffn_hidden_size": final.model.ffn_hidden_size // 4}, stages)


SCRATCH = "scratch"
METHODS: dict[str, Method] = {
    SCRATCH: Method("vanilla"),
    "g_stack-2": _g_stack(2),
    "g_stack-4": _g_stack(4),
    "midas": _midas(4),
    "msg-ffn": _msg_ffn(),
    "sgt": Method("sgt"),
    "sgt+g_stack-2": _g_stack(2, "sgt"),
}


def run_flops(config: Config) -> int:
    """Model FLOPs of a whole run, planned: all stages, loops where the schedule's decisions cost most."""
    return sum(stage.flops for stage in plan_stages(config))


def _settings(method: Method, final: Config, steps: int) -> tuple[str, ...]:
    stages = method.stages(final, steps)
    first = [f"model.{name}={value}" for name, value in method.first(final).items()]
    grow = [f"growth.stages={stages}"] if stages else []
    return (*first, *grow, f"train.train_iters={steps}", f"train.eval_interval={steps}")


def _equal_steps(cost: Callable[[int], int], budget: int, steps: int) -> int:
    """The number of steps whose ``cost``, which rises with it, is nearest to ``budget``, the cost of ``steps``."""
    low, high = steps // 2, _MOST_STEPS * steps
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) < budget else (low, middle)
    return min(low, high, key=lambda steps: abs(cost(steps) - budget))


def _contenders(load: Loader, names: tuple[str, ...]) -> list[Contender]:
    """Each of METHODS at the FLOPs of the file's run.

    Raises:
        ConfigError: one of ``names`` is unknown, or no number of steps comes near enough.
    """
    if unknown := [name for name in names if name not in METHODS]:
        raise ConfigError(f"no way to grow is called {unknown[0]}: choose from {', '.join(METHODS)}")
    final = load("vanilla", ())
    budget = run_flops(final)
    found = []
    for name in names:
        method = METHODS[name]

        def planned(steps: int, method: Method = method) -> Config:
            return load(method.preset, _settings(method, final, steps))

        steps = _equal_steps(lambda steps: run_flops(planned(steps)), budget, final.train.train_iters)
        config = planned(steps)
        if abs(run_flops(config) / budget - 1) > TOLERANCE:
            raise ConfigError(
                f"train.train_iters: {final.train.train_iters} are too few: {name} comes no nearer to their FLOPs than "
                f"{run_flops(config) / budget - 1:+.1%}; take more"
            )
        found.append(Contender(name, method.preset, _settings(method, final, steps), _about(config)))
    return found


def _about(config: Config) -> str:
    """The stages in a few words: what differs of the models, and how many steps each is trained."""
    stages = [one.stage for one in plan_stages(config)]
    wider = len({stage.config.model.ffn_hidden_size for stage in stages}) > 1
    sizes = [
        f"{stage.config.model.ffn_hidden_size} units" if wider else f"{stage.config.model.num_layers} layers"
        for stage in stages
    ]
    return ", ".join(f"{size}: {stage.last - stage.first:,}" for size, stage in zip(sizes, stages, strict=True))


GROWING = Study(
    SCRATCH,
    tuple(METHODS),
    (
        Claim("stacking twice beats training from scratch", "g_stack-2", SCRATCH),
        Claim("stacking four times beats training from scratch", "g_stack-4", SCRATCH),
        Claim("MIDAS beats training from scratch", "midas", SCRATCH),
        Claim("growing the feed-forward layers beats training from scratch", "msg-ffn", SCRATCH),
        Claim("stacking beats widening", "g_stack-4", "msg-ffn"),
        Claim("SGT beats vanilla at equal FLOPs", "sgt", SCRATCH),
        Claim("SGT on top of stacking beats stacking", "sgt+g_stack-2", "g_stack-2"),
    ),
    _contenders,
    " from scratch, for the others as many as cost the same FLOPs; seeds 1 to {seeds}, one data order each.",
)
