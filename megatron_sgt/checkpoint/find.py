"""Which checkpoint a run starts from, and whether it fits; all checks come before any weight is touched.

No torch: a login node uses this too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.config import Config, recorded_config
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
    ``checkpoint.load`` is used; there, finding nothing or a damaged checkpoint is an error.

    Args:
        damaged: checkpoints already known to be damaged, and how.

    Raises:
        CheckpointError: checkpoint.load holds no whole checkpoint, all of the run's own are damaged, or the run
            would leave checkpoints of another run beside its own.
    """
    own = config.save_dir
    if config.checkpoint.resume == "auto" and (found := _newest_whole(own, damaged or {})) is not None:
        return found
    if config.checkpoint.load is not None:
        folder = layout.resolve(Path(config.checkpoint.load))
        _refuse_mixture(own, layout.step_of(folder.name))
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
            _verify_quickly(folder)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return Found(folder, tuple(skipped))
    if skipped:
        raise CheckpointError("; ".join([*skipped, f"no other in {own}. To start from scratch, move that folder away"]))
    return None


def _verify_quickly(folder: Path) -> dict[str, Any]:
    """Check all sizes, the checksums of the small files and the list of files; returns the manifest."""
    manifest.verify_sizes(folder)
    content = manifest.read_manifest(folder)
    small = layout.expected_files(None)
    listed = content["files"]
    now = manifest.describe_files(folder, small & set(listed))
    problems = [f"{name} has changed since it was saved" for name in sorted(now) if now[name] != listed[name]]
    wanted = layout.expected_files(content.get("layout"))
    problems += [f"{name} is not listed in {layout.MANIFEST_FILE}" for name in sorted(wanted - set(listed))]
    manifest.refuse(folder, problems)
    return content


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


def check_checkpoint(folder: Path, config: Config, tokenizer: str | None = None) -> dict[str, Any]:
    """Check that ``folder`` is whole and fits the model of ``config``; return its saved state.

    Needs no process group. ``tokenizer``: fingerprint of this run's, None if it has none.

    Raises:
        CheckpointError: naming the damaged files or the differing fields.
    """
    about = _verify_quickly(folder)
    state = layout.read_json(folder / layout.STATE_FILE)
    try:
        saved = recorded_config(folder / layout.CONFIG_FILE).model.model_dump()
    except ConfigError as error:
        raise CheckpointError(f"{folder / layout.CONFIG_FILE} cannot be read: {error}") from error
    wanted = config.model.model_dump()
    differing = [
        f"model.{name} is {saved.get(name)} there and {wanted[name]} here"
        for name in wanted
        if name not in _FREE_MODEL_FIELDS and saved.get(name) != wanted[name]
    ]
    if differing:
        raise CheckpointError(f"checkpoint {folder} belongs to another model: " + "; ".join(differing))
    before = about.get("tokenizer")
    if tokenizer is not None and before is not None and tokenizer != before:
        raise CheckpointError(
            f"checkpoint {folder} belongs to another tokenizer: its fingerprint is {before} there and {tokenizer} "
            "here, so the same text would become different tokens; set data.tokenizer to the one it was trained with"
        )
    return state
