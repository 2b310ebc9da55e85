"""From ``growth.method`` to a schedule: the built-in ones, and those that packages or the process itself register."""

from __future__ import annotations

from typing import Any

from megatron_sgt import extensions
from megatron_sgt.config import Config, parse_config
from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth.plan import LoopPlan
from megatron_sgt.growth.replay import ReplaySchedule
from megatron_sgt.growth.schedule import PROBES, Schedule
from megatron_sgt.growth.sgt import SGTSchedule
from megatron_sgt.growth.static import BlockLoop, Vanilla

BUILT_IN: dict[str, type[Schedule]] = {rule.name: rule for rule in (SGTSchedule, Vanilla, BlockLoop)}
"""Methods of this project; for an imported model the first that can have made it is taken."""


def build_schedule(config: GrowthConfig, num_layers: int, num_heads: int) -> Schedule:
    """The schedule that ``config`` names, at its beginning.

    Raises:
        ConfigError: nothing of this name is registered, or something that is no schedule of this name; a recorded run
            cannot be repeated; the schedule refuses its settings or wants to observe what cannot be observed.
    """
    rule = BUILT_IN.get(config.method) or _registered(config.method)
    schedule = (rule if config.replay is None else ReplaySchedule)(config, num_layers, num_heads)
    unknown = sorted(schedule.probes - PROBES)
    if unknown:
        raise ConfigError(
            f"growth.method {config.method!r} wants to observe {unknown}, which training does not measure; it "
            f"measures {sorted(PROBES)}"
        )
    return schedule


def _registered(name: str) -> type[Schedule]:
    rule = extensions.load("schedules", name)
    if not (isinstance(rule, type) and issubclass(rule, Schedule)):
        raise ConfigError(f"growth.method {name!r} is registered as {rule!r}, which is no Schedule class")
    if getattr(rule, "name", None) != name:
        raise ConfigError(
            f"growth.method {name!r} is registered as {rule.__qualname__}, whose name is "
            f"{getattr(rule, 'name', None)!r}"
        )
    return rule


def with_schedule(config: Config, rule: type[Schedule]) -> Config:
    """``config`` with ``growth.method`` naming ``rule``, which is registered for this process if it is not yet.

    What belongs to another method is left out: a recorded run, looped blocks.

    Raises:
        ConfigError: its name is that of another schedule, or its options are not those of ``config``.
    """
    if rule.name in BUILT_IN:
        raise ConfigError(f"{rule.__qualname__}.name: {rule.name!r} is a built-in method; choose another name")
    if rule.name not in extensions.names("schedules"):
        extensions.register("schedules", rule.name, rule)
    if extensions.load("schedules", rule.name) is not rule:
        raise ConfigError(f"{rule.__qualname__}.name: {rule.name!r} is registered for another schedule")
    values = config.model_dump()
    values["growth"] |= {"method": rule.name, "replay": None, "block_loop_layers": ()}
    return parse_config(values)


def settings_for(plan: LoopPlan, num_heads: int) -> dict[str, Any]:
    """A growth section for a model that has finished growing as ``plan``, or has not begun where that is empty.

    Raises:
        ConfigError: no built-in method makes such a plan.
    """
    for rule in BUILT_IN.values():
        settings = rule.settings_for(plan, num_heads)
        if settings is not None:
            return settings
    raise ConfigError(
        f"loops {plan.to_dict()['layers']}: a run repeats whole layers equally often, or loops heads, not both"
    )
