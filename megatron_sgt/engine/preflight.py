"""What can be refused before anything is built: places that cannot be written, checkpoints that do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from megatron_sgt.checkpoint.find import check_checkpoint, find_checkpoint
from megatron_sgt.checkpoint.layout import CONFIG_FILE
from megatron_sgt.checkpoint.load import starts_fresh
from megatron_sgt.cli import unwritable
from megatron_sgt.config import Config, load_config
from megatron_sgt.data.tokenizer import build_tokenizer, resolve_vocab_size
from megatron_sgt.engine.deepspeed_config import deepspeed_config
from megatron_sgt.engine.hooks.growth import GrowthHook
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.metrics.writers import check_packages
from megatron_sgt.planning.structure import schedule_of

# Settings that decide where and how a run is watched, not what it computes.
_UNREMARKABLE = (
    "checkpoint.",
    "logging.",
    "train.exit_interval",
    "train.threads_per_rank",
    "train.hang_timeout_seconds",
    "train.slow_phase_timeout_seconds",
    "train.straggler_threshold",
    "train.replica_check_interval",
    "data.num_workers",
)


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint, or from nothing (``folder`` None).

    ``saved``: the checkpoint's JSON state; ``sentence``: says which of the two it is; ``changed``: settings
    that the checkpoint was saved with otherwise, as "train.train_iters 8 -> 12"; ``skipped``: damaged ones that
    were passed over; ``explicit``: the user named the checkpoint.
    """

    folder: Path | None
    saved: dict[str, Any]
    sentence: str
    changed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    explicit: bool = False


def with_vocabulary(config: Config) -> Config:
    """``config`` with model.vocab_size taken from the tokenizer where it was left null.

    Raises DataError when the tokenizer cannot be read or has more tokens than model.vocab_size.
    """
    tokenizer = None if config.data.tokenizer is None else build_tokenizer(config.data.tokenizer)
    size = resolve_vocab_size(config.model.vocab_size, tokenizer)
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def check_surroundings(config: Config) -> None:
    """Raises ConfigError: a package that logging asks for is missing, a folder can be neither made nor written."""
    check_packages(config.logging)
    for option, folder in (
        ("logging.run_dir", Path(config.logging.run_dir)),
        ("checkpoint.save", config.save_dir),
    ):
        reason = unwritable(folder)
        if reason is not None:
            raise ConfigError(f"{option}: cannot write to {folder}: {reason}; choose another folder")


def check_deepspeed(config: Config, world_size: int, precision: str) -> None:
    """Raises ConfigError when DeepSpeed itself refuses a value of the section deepspeed."""
    values = deepspeed_config(config, world_size, precision)
    del values["train_batch_size"]  # DeepSpeed knows no world size yet to compare it with
    try:
        DeepSpeedConfig(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
        raise ConfigError(
            f"deepspeed: refused by DeepSpeed: {'; '.join(lines)}; correct it or leave it out"
        ) from error
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"deepspeed: refused by DeepSpeed: {error}; correct it or leave it out") from error


def find_start(config: Config, damaged: Mapping[Path, str] | None = None) -> Start:
    """Find the checkpoint that the run continues from, and check that it is whole (by sizes) and fits.

    Args:
        damaged: checkpoints that were found to be damaged already, and how.

    Raises CheckpointError: nothing at checkpoint.load, a damaged checkpoint, another model, tokenizer or growth.
    """
    found = find_checkpoint(config, damaged)
    if found.folder is None:
        return Start(None, {}, found.sentence)
    saved = check_checkpoint(found.folder, config, tokenizer_fingerprint(config))
    _check_growth(found.folder, saved, config)
    changes = tuple(_changes(load_config(found.folder / CONFIG_FILE), config))
    return Start(found.folder, saved, found.sentence, changes, found.skipped, found.explicit)


def tokenizer_fingerprint(config: Config) -> str | None:
    """What a checkpoint remembers of the tokenizer, None without one. Raises DataError."""
    return None if config.data.tokenizer is None else build_tokenizer(config.data.tokenizer).fingerprint()


def _check_growth(folder: Path, saved: dict[str, Any], config: Config) -> None:
    if starts_fresh(saved, GrowthHook.name):
        return
    schedule = schedule_of(config)
    try:
        schedule.load_state_dict(saved["hooks"][GrowthHook.name]["schedule"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} holds no growth state: {error!r}") from error
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {folder}: {error}") from error


def _changes(there: Config, here: Config) -> Iterator[str]:
    before, now = dict(_leaves(there.model_dump())), dict(_leaves(here.model_dump()))
    for name in before | now:
        if before.get(name) != now.get(name) and not name.startswith(_UNREMARKABLE):
            yield f"{name} {before.get(name)} -> {now.get(name)}"


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
