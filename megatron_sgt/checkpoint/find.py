"""Which checkpoint a run starts from, and whether it fits; all checks come before any weight is touched.

No torch: a login node uses this too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.forms import read_config, read_state
from megatron_sgt.config import Config
from megatron_sgt.config.base import shown
from megatron_sgt.config.growth import RampConfig
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import CheckpointError, ConfigError

# Model fields that may differ between the run that saved and the one that loads: they shape no weight.
_FREE_MODEL_FIELDS = {
    "seq_length",
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "use_cpu_initialization",
}


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run starts from; ``folder`` None: there is none.

    ``skipped``: why newer ones were not used, one line each. ``explicit``: the user named it.
    """

    folder: Path | None
    skipped: tuple[str, ...] = ()
    explicit: bool = False


def find_checkpoint(config: Config, damaged: Mapping[Path, str] | None = None) -> Found:
    """The checkpoint that this run starts from.

    ``checkpoint.resume: auto`` looks for this run's own checkpoints first and skips damaged ones. Otherwise
    ``checkpoint.load`` is used; there, finding nothing or a damaged checkpoint is an error. With ``checkpoint.start:
    weights`` what is found there is of another run, whose weights a new one begins with.

    Args:
        damaged: checkpoints already known to be damaged, and how.

    Raises:
        CheckpointError: checkpoint.load holds no whole checkpoint, all of the run's own are damaged, or the run
            would leave checkpoints of another run beside its own, or go on from them.
    """
    own, begins = config.save_dir, config.checkpoint.start == "weights"
    load = None if config.checkpoint.load is None else Path(config.checkpoint.load)
    if begins and load is not None and own.resolve() in (load.resolve(), load.resolve().parent):
        raise CheckpointError(
            f"checkpoint.load {load} lies where the run saves, in {own}, but checkpoint.start weights begins a new "
            "run, which needs folders of its own; choose another logging.run_dir or checkpoint.save"
        )
    if config.checkpoint.resume == "auto" and (found := _newest_whole(own, damaged or {})) is not None:
        if begins and found.folder is not None:
            _refuse_other_run(own, found.folder)
        return found
    if load is not None:
        folder = layout.resolve(load)
        _refuse_mixture(own, 0 if begins else layout.step_of(folder.name))
        return Found(folder, explicit=True)
    _refuse_mixture(own, 0)
    return Found(None)


def _newest_whole(own: Path, damaged: Mapping[Path, str]) -> Found | None:
    tags, note = layout.candidates(own)
    skipped = [] if note is None else [note]
    for folder in (own / tag for tag in tags):
        try:
            if folder in damaged:
                raise CheckpointError(damaged[folder])
            verify_quickly(folder)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return Found(folder, tuple(skipped))
    if skipped:
        raise CheckpointError("; ".join([*skipped, f"no other in {own}. To start from scratch, move that folder away"]))
    return None


@dataclass(frozen=True)
class Whole:
    """The small files of a checkpoint whose files are all there, as far as they can be told by their sizes."""

    about: dict[str, Any]
    state: dict[str, Any]
    config: Config


def verify_quickly(folder: Path) -> Whole:
    """Check all sizes, the checksums of the small files, the list of files, and that the small files fit each other.

    Raises:
        DamagedCheckpointError: naming what is wrong.
    """
    manifest.verify_sizes(folder)
    content = manifest.read_manifest(folder)
    small = layout.expected_files(None)
    listed = content["files"]
    now = manifest.describe_files(folder, small & set(listed))
    changed = [name for name in sorted(now) if now[name]["sha256"] != listed[name]["sha256"]]
    problems = [f"{name} has changed since it was saved" for name in changed]
    where = content.get("layout")
    if where and layout.model_parallel_size(where) * where["data_parallel_size"] > len(listed):
        problems.append(f"{layout.MANIFEST_FILE} lists {len(listed)} files for the ranks of its layout")
    else:
        missing = sorted(layout.expected_files(where) - set(listed))
        problems += [f"{name} is not listed in {layout.MANIFEST_FILE}" for name in missing]
    manifest.refuse(folder, problems)
    state, config = read_state(folder), read_config(folder)
    manifest.refuse(folder, list(_contradictions(folder, content, state, config)))
    return Whole(content, state, config)


def _contradictions(folder: Path, about: Mapping[str, Any], state: Mapping[str, Any], config: Config) -> Iterator[str]:
    """What manifest, state and configuration say otherwise than each other; older versions say less."""
    step = state["trainer"]["step"]
    named = layout.named_step(folder.name)
    if about.get("step", step) != step or (named is not None and named != step):
        yield f"{layout.STATE_FILE} is of step {step:,}"
    if about.get("layout", state["layout"]) != state["layout"]:
        yield f"{layout.STATE_FILE} is of another layout"
    elif layout.AVERAGE_STATE in state:
        missing = layout.expected_files(state["layout"], averaged=True) - set(about["files"])
        yield from (f"{name} is not listed in {layout.MANIFEST_FILE}" for name in sorted(missing))
    hashed = about.get("config_sha256")
    if hashed is not None and hashed != about["files"][layout.CONFIG_FILE]["sha256"]:
        yield f"{layout.CONFIG_FILE} is another configuration"
    if state["layout"] is not None:
        try:
            layout.pipeline_of(state["layout"], config.model.num_layers)
        except ValueError as error:
            yield f"{layout.STATE_FILE} is of another model: {error}"


def _refuse_other_run(own: Path, newest: Path) -> None:
    """The new run of checkpoint.start weights goes on from its own checkpoints, never from another run's."""
    if layout.ORIGIN_STATE not in read_state(newest):
        raise CheckpointError(
            f"checkpoint.start is weights, but {own} holds checkpoints of a run that did not begin so ({newest.name}): "
            "a new run needs folders of its own. Choose another logging.run_dir or checkpoint.save, or set "
            "checkpoint.start to resume to continue that run"
        )


def _refuse_mixture(own: Path, step: int) -> None:
    """Two runs in one folder would delete each other's checkpoints and resume from the wrong ones."""
    later = [tag for tag in layout.finished_tags(own) if layout.step_of(tag) > step]
    if later:
        raise CheckpointError(
            f"checkpoint.resume is never, but {own} holds checkpoints of another run: {', '.join(later)}. "
            "Choose another logging.run_dir or checkpoint.save, move them away, or set checkpoint.resume: auto "
            "to continue from the newest"
        )


def starts_fresh(saved: dict[str, Any], hook: str) -> bool:
    """Whether a hook has no saved state because no run has trained this checkpoint yet: an imported model."""
    return hook not in saved["hooks"] and saved["trainer"]["step"] == 0


def differing_sizes(there: ModelConfig, here: ModelConfig) -> list[str]:
    """Fields in which the model of a checkpoint and that of a run differ, so that its weights do not fit."""
    saved, wanted = _sizes(there), _sizes(here)
    return [
        f"model.{name} is {saved[name]} there and {wanted[name]} here" for name in wanted if saved[name] != wanted[name]
    ]


def _sizes(model: ModelConfig) -> dict[str, Any]:
    return model.model_dump(exclude=_FREE_MODEL_FIELDS) | {
        "rotary_scaling": None if model.rotary_scaling is None else model.rotary_scaling.positions()
    }


def check_checkpoint(folder: Path, config: Config, tokenizer: str | None = None) -> dict[str, Any]:
    """Check that ``folder`` is whole and fits the model of ``config``; return its saved state.

    Needs no process group. ``tokenizer``: fingerprint of this run's, None if it has none.

    Raises:
        CheckpointError: naming the damaged files or the differing fields.
        ConfigError: see ``check_added``.
    """
    found = verify_quickly(folder)
    step = found.state["trainer"]["step"]
    if differing := differing_sizes(found.config.at_step(step).model, config.at_step(step).model):
        raise CheckpointError(f"checkpoint {folder} belongs to another model: " + "; ".join(differing))
    before = found.about.get("tokenizer")
    if tokenizer is not None and before is not None and tokenizer != before:
        raise CheckpointError(
            f"checkpoint {folder} belongs to another tokenizer: its fingerprint is {before} there and {tokenizer} "
            "here, so the same text would become different tokens; set data.tokenizer to the one it was trained with"
        )
    if not config.growth.stages:  # else it is not known here which stage, and so which ramp, it belongs to
        _check_ramp(folder, found, config.growth.ramp)
    return found.state


def check_added(ramp: RampConfig | None, step: int) -> None:
    """Check that what ``ramp`` fades in was there by ``step``, from which the run starts: before, it would be dead.

    Raises:
        ConfigError: it was not.
    """
    if ramp is not None and ramp.first > step:
        raise ConfigError(
            f"growth.ramp: fades in what was added after step {ramp.first:,}, but the run starts from step {step:,}; "
            "only growth writes a ramp (growing.md), remove it"
        )


def _check_ramp(folder: Path, found: Whole, here: RampConfig | None) -> None:
    there, step = found.config.growth.ramp, found.state["trainer"]["step"]
    if there != here and any(ramp is not None and step < ramp.end for ramp in (there, here)):
        raise CheckpointError(
            f"checkpoint {folder} is at step {step:,}, and growth.ramp is {_shown(there)} there and {_shown(here)} "
            "here: what is being faded in cannot change; restore it from the checkpoint's config.yaml"
        )
    check_added(here, step)


def _shown(ramp: RampConfig | None) -> str:
    return shown(None if ramp is None else ramp.model_dump(exclude_defaults=True, mode="json"))
