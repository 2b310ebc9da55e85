"""A new run that begins with the weights of another's checkpoint (checkpoint.start: weights).

Only the weights are taken, and with checkpoint.growth: keep the structure that they were trained in. What is compared
is what they depend on; where they came from is kept in every checkpoint of the new run (``layout.ORIGIN_STATE``). No
torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.find import Whole, differing_sizes
from megatron_sgt.checkpoint.forms import COUNTERS
from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import CheckpointError, ConfigError

_FREE = ("rotary_base", "rotary_scaling", "vocab_size", "make_vocab_size_divisible_by")
"""Fields that may be others beside those of any start: they shape no weight, where the rows of the vocabulary fit."""


def check_weights(folder: Path, there: Whole, config: Config, tokenizer: str | None) -> tuple[str, ...]:
    """Check that the weights of ``folder`` fit the first model of the new run ``config``.

    Args:
        tokenizer: fingerprint of the new run's, None if it has none or it is not known here.

    Returns:
        What of their meaning changes, a phrase each.

    Raises:
        CheckpointError: the model has another shape, the weights are being faded in, or there is no average of them.
        ConfigError: the new run has a growth.ramp.
    """
    if differing := _differing(there.config.model, config.model):
        raise CheckpointError(
            f"checkpoint {folder} belongs to another model: {'; '.join(differing)}; checkpoint.start weights needs the "
            "same shape (tools/grow_checkpoint.py makes a deeper or wider one)"
        )
    step, ramp = there.state["trainer"]["step"], there.config.growth.ramp
    if ramp is not None and step < ramp.end:
        raise CheckpointError(
            f"checkpoint {folder} is at step {step:,}, and growth.ramp fades in a part of its model until step "
            f"{ramp.end:,}: the weights alone are another model. Begin with a checkpoint from step {ramp.end:,} on"
        )
    if config.growth.ramp is not None:
        raise ConfigError(
            "growth.ramp: fades in what a growth has added, and checkpoint.start weights adds nothing; remove it"
        )
    if config.checkpoint.weights == "ema" and layout.AVERAGE_STATE not in there.state:
        raise CheckpointError(
            f"checkpoint {folder} holds no average of the weights, as its run had train.ema_decay 0; set "
            "checkpoint.weights to model"
        )
    before = there.about.get("tokenizer")
    if None in (before, tokenizer) or before == tokenizer:
        return ()
    return (f"the tokenizer (fingerprint {before} -> {tokenizer}): the same text becomes other tokens",)


def _differing(there: ModelConfig, here: ModelConfig) -> list[str]:
    alike = there.model_copy(update={name: getattr(here, name) for name in _FREE})
    differing = differing_sizes(alike, here)
    if None not in (there.vocab_size, here.vocab_size) and there.padded_vocab_size() != here.padded_vocab_size():
        differing.append(
            f"model.vocab_size {there.vocab_size} has {there.padded_vocab_size()} rows there, {here.vocab_size} has "
            f"{here.padded_vocab_size()} here"
        )
    return differing


def new_state(folder: Path, there: Whole, config: Config, libraries: bool) -> dict[str, Any]:
    """The state with which the new run ``config`` begins: nothing has been trained or read.

    Args:
        libraries: False leaves out what needs NumPy: the structure that is kept.

    Raises:
        CheckpointError: checkpoint.growth is keep, and growth.method cannot have made the structure.
    """
    state: dict[str, Any] = {
        "trainer": dict.fromkeys(COUNTERS, 0),
        "hooks": {},
        "layout": there.state["layout"],
        layout.ORIGIN_STATE: origin_of(folder, there, config),
    }
    if layout.IMPORTED_STATE in there.state:  # the ids and the name of the model that was imported hold on
        state[layout.IMPORTED_STATE] = there.state[layout.IMPORTED_STATE]
    if config.checkpoint.keeps_growth and libraries:
        state["hooks"][layout.GROWTH_STATE] = {"schedule": _kept(folder, there, config), "events": []}
    return state


def origin_of(folder: Path, there: Whole, config: Config) -> dict[str, Any]:
    """What the new run remembers of the checkpoint ``folder``.

    ``tokens``: that the weights were trained on in all, in that run and in those that it began from.
    """
    before = there.state.get(layout.ORIGIN_STATE, {}).get("tokens", 0)
    tokens = there.state["trainer"]["consumed_samples"] * there.config.model.seq_length
    return {
        "checkpoint": str(folder),
        "run": there.about.get("run"),
        "step": there.state["trainer"]["step"],
        "tokens": before + there.about.get("tokens", tokens),
        "weights": config.checkpoint.weights,
        "growth": "keep" if config.checkpoint.keeps_growth else "restart",
    }


def _kept(folder: Path, there: Whole, config: Config) -> dict[str, Any]:
    """The state of the schedule of ``config``, fixed where the checkpoint's stands: other heads fade no further."""
    from megatron_sgt.planning.structure import resumed_schedule, schedule_of  # needs NumPy

    plan = resumed_schedule(there.config, there.state["hooks"].get(layout.GROWTH_STATE)).plan.inference()
    schedule = schedule_of(config)
    try:
        schedule.adopt(plan)
    except ConfigError as error:
        raise CheckpointError(
            f"checkpoint {folder} has loops that checkpoint.growth keep cannot keep: {error}. Change that, or set "
            "checkpoint.growth to restart, which begins without loops"
        ) from error
    return schedule.state_dict()
