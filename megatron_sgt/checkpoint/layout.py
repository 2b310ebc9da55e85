"""Where checkpoints lie, how their files are called, and which of them count.

    <root>/latest                        text: global_step1000, replaced atomically, last of all
    <root>/latest_checkpointed_iteration.txt    the same for Megatron's tools: 1000
    <root>/global_step1000/
        sgt_state.json                   counters, growth state, layout
        config.yaml                      the resolved configuration
        mp_rank_00_model_states.pt ...   see ``files_of_rank``
        rng_rank_00000.pt                random streams, one file per rank
        ema_0000_mp_rank_00.pt           with train.ema_decay: the average of the weights, see ``average_file``
        manifest.json                    every file with its size and SHA-256; written last
    <root>/global_step1000.1f0c9a3e.tmp/ a save that was not finished; never read

Pure file-system functions, no process group.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from megatron_sgt import files
from megatron_sgt.config.pipeline import PipelineLayout
from megatron_sgt.errors import CheckpointError, DamagedCheckpointError, first_line
from megatron_sgt.files import TEMPORARY_SUFFIX
from megatron_sgt.lease import LEASE_FILE, beside, holder_of

STATE_FILE = "sgt_state.json"
CONFIG_FILE = "config.yaml"
MANIFEST_FILE = "manifest.json"
LATEST_FILE = "latest"
ITERATION_FILE = "latest_checkpointed_iteration.txt"
COPY_SUFFIX = ".universal"
"""Ends the name of the layout-free copy that a run has made of a checkpoint beside it."""
PASSED_FILE = "passed_data.json"
"""Beside the checkpoints of a run: what it skips of its data (engine/skipped_ranges.py)."""
GROWTH_STATE = "growth"
"""Where the state of growth lies among those of the hooks in STATE_FILE."""
AVERAGE_STATE = "ema"
"""Key in STATE_FILE of a checkpoint that holds an average of the weights: its decay."""
STAGES_STATE = "stages"
"""Key in STATE_FILE of a checkpoint whose model has grown in the run: how each stage but the first began."""
DATA_STATE = "data"
"""Where STATE_FILE says in which orders the run has read its data; checkpoints of older versions do not."""
IMPORTED_STATE = "imported"
"""Key in STATE_FILE of an imported model and of the run that trains it: what exports keep (export/inherited.py)."""
ORIGIN_STATE = "origin"
"""Key in STATE_FILE, and in the manifest, of a run that began with the weights of another: see new_run.py."""
PIPELINE_SIZE = "pipeline_model_parallel_size"
PIPELINE_COUNTS = "pipeline_model_parallel_layout"
"""Keys of a layout with a pipeline: its stages, and the layers of every chunk (config/pipeline.py)."""
_WANTED = (
    f"give a folder that holds global_stepN folders with a {MANIFEST_FILE}, or one such folder; to start from "
    "scratch leave checkpoint.load empty"
)
_TAG = re.compile(r"global_step([0-9]+)")
_MODEL = "_model_states.pt"
_LARGEST_JSON = 1 << 28
"""Bytes: a manifest of a million files. Nothing larger is parsed."""


def tag_for(step: int) -> str:
    """Folder name of the checkpoint after ``step`` optimizer steps."""
    return f"global_step{step}"


def step_of(tag: str) -> int:
    """The step in a folder name of ``tag_for``; 0 for any other name."""
    return named_step(tag) or 0


def named_step(tag: str) -> int | None:
    """The step in a folder name of ``tag_for``; None for any other name."""
    match = _TAG.fullmatch(tag)
    return int(match.group(1)) if match else None


def rng_file(rank: int) -> str:
    """File name of one rank's random streams."""
    return f"rng_rank_{rank:05d}.pt"


def model_file(mp_rank: int) -> str:
    """DeepSpeed's file of one model-parallel rank's weights, which all data-parallel ranks share (not at ZeRO 3).

    ``mp_rank``: see ``ParallelGroups``; without a pipeline the tensor-parallel rank.
    """
    return f"mp_rank_{mp_rank:02d}{_MODEL}"


def is_model_file(name: str) -> bool:
    """Whether ``name`` is one of ``model_file``."""
    return name.startswith("mp_rank_") and name.endswith(_MODEL)


def part_file(model_file: str, dp_rank: int) -> str:
    """Where data-parallel rank ``dp_rank`` > 0 writes its share of what DeepSpeed would put into ``model_file``."""
    return f"weights_{dp_rank:04d}_{model_file.removesuffix(_MODEL)}.pt"


def average_file(where: Mapping[str, Any], mp_rank: int, dp_rank: int) -> str:
    """The file of one rank's average of the weights; at ZeRO 0 all data-parallel ranks have the first one's."""
    return f"ema_{dp_rank if where['zero_stage'] else 0:04d}_mp_rank_{mp_rank:02d}.pt"


def pipeline_of(where: Mapping[str, Any], num_layers: int) -> PipelineLayout:
    """Which of a model's ``num_layers`` each stage of a pipeline held under the layout ``where``.

    Raises:
        ValueError: they are other layers than the model has.
    """
    pipeline = PipelineLayout(where.get(PIPELINE_SIZE, 1), tuple(where.get(PIPELINE_COUNTS, [num_layers])))
    if pipeline.num_layers != num_layers:
        raise ValueError(f"the stages of its pipeline hold {pipeline.num_layers} layers, its model has {num_layers}")
    return pipeline


def model_parallel_size(where: Mapping[str, Any]) -> int:
    """Ranks that shared one copy of the model."""
    size: int = where["tensor_model_parallel_size"] * where.get(PIPELINE_SIZE, 1)
    return size


def files_of_rank(where: Mapping[str, Any], mp_rank: int, dp_rank: int) -> tuple[str, ...]:
    """DeepSpeed's files that one rank reads: its weights, and above ZeRO 0 its part of the optimizer state.

    Args:
        where: the layout that they were written under, see ``checkpoint.save.layout_of``.
    """
    part = f"zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}"  # DeepSpeed calls a data-parallel rank so
    model = f"{part}{_MODEL}" if where["zero_stage"] == 3 else model_file(mp_rank)
    optimizer = f"{'bf16_' if where.get('precision') == 'bf16' else ''}{part}_optim_states.pt"
    return (model, optimizer) if where["zero_stage"] else (model,)


def expected_files(where: Mapping[str, Any] | None, averaged: bool = False) -> set[str]:
    """The files that every checkpoint of a layout has; of a layout-free one (None) those of every kind.

    ``averaged``: it holds an average of the weights.
    """
    names = {STATE_FILE, CONFIG_FILE}
    if where is None:
        return names
    mp_size, dp_size = model_parallel_size(where), where["data_parallel_size"]
    for mp_rank, dp_rank in product(range(mp_size), range(dp_size)):
        names |= {*files_of_rank(where, mp_rank, dp_rank)}
        if averaged:
            names.add(average_file(where, mp_rank, dp_rank))
    return names | {rng_file(rank) for rank in range(mp_size * dp_size)}


def finished_tags(root: Path) -> list[str]:
    """Tags of the checkpoints under ``root`` that were committed, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(m.group(1)), p.name) for p in root.iterdir() if (m := _TAG.fullmatch(p.name)) and p.is_dir()]
    return [name for _, name in sorted(found) if _is_committed(root / name)]


def _is_committed(folder: Path) -> bool:
    """Whether ``folder`` has a manifest; one that may not be looked into counts, so that it is named, not forgotten."""
    try:
        return (folder / MANIFEST_FILE).is_file()
    except PermissionError:
        return True


def latest_tag(root: Path) -> str | None:
    """The tag that ``latest`` names; without that file the newest committed one; None if there is none.

    Raises:
        CheckpointError: ``latest`` names a checkpoint that is not there.
    """
    tracker = root / LATEST_FILE
    tags = finished_tags(root)
    if not os.path.lexists(tracker):
        return tags[-1] if tags else None
    try:
        with tracker.open("rb") as stream:
            tag = stream.read(1 << 10).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{tracker} cannot be read: {error}; write one of these into it, or give its folder as checkpoint.load: "
            f"{', '.join(tags) or 'none'}"
        ) from error
    if tag not in tags:
        raise CheckpointError(
            f"{tracker} names {_shortened(tag)}, which is not a whole checkpoint; there are: "
            f"{', '.join(tags) or 'none'}. Write one of these into {tracker}, or give its folder as checkpoint.load"
        )
    return tag


def candidates(root: Path) -> tuple[list[str], str | None]:
    """Committed tags in the order in which a run tries to resume from them, and what is wrong with ``latest``.

    First the one that ``latest`` names, then older ones, then later ones, which were abandoned by a rollback.
    """
    tags = finished_tags(root)[::-1]
    try:
        latest = latest_tag(root)
    except CheckpointError as error:
        return tags, str(error)
    if latest is None:
        return [], None
    older = [tag for tag in tags if step_of(tag) < step_of(latest)]
    return [latest, *older, *(tag for tag in tags if step_of(tag) > step_of(latest))], None


def resolve(path: Path) -> Path:
    """The checkpoint folder that a user's path means: itself, or the latest in a folder of checkpoints.

    Raises:
        CheckpointError: there is no whole checkpoint at ``path``.
    """
    if (path / MANIFEST_FILE).is_file():
        return path
    if path.is_dir() and (tag := latest_tag(path)) is not None:
        return path / tag
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: the folder does not exist; {_WANTED}")
    seen = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else "a file"
    raise CheckpointError(f"no whole checkpoint at {path} (seen there: {seen or 'nothing'}); {_WANTED}")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` durably: the file is on disk when this returns.

    Raises:
        OSError: it cannot be written.
    """
    files.write_text(path, json.dumps(value, indent=1))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DamagedCheckpointError: it is missing or damaged.
    """
    try:
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes")
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {first_line(error)}") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text as ``json.dumps`` writes it.

    Raises:
        ValueError: it is no JSON, or has a key twice, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {_shortened(key)} stands twice")
        found[key] = value
    return found


def _shortened(text: str) -> str:
    return ascii(text if len(text) <= 60 else f"{text[:60]}...")


def point_to(root: Path, tag: str) -> None:
    """Make ``tag`` the checkpoint that a run resumes from.

    Raises:
        OSError: the pointer cannot be written.
    """
    mark = f".{secrets.token_hex(4)}"  # of this process alone, see Saver
    files.replace_text(root / LATEST_FILE, tag, mark)
    files.replace_text(root / ITERATION_FILE, f"{step_of(tag)}\n", mark)


def carry_passed_data(there: Path, here: Path) -> None:
    """Let checkpoints in ``here`` skip the data that those in ``there`` do.

    Not where checkpoints are already: the run that they belong to skips what it skips.

    Raises:
        OSError: the file cannot be read or written.
    """
    if (there / PASSED_FILE).is_file() and not (here / PASSED_FILE).exists() and not finished_tags(here):
        with files.replacing(here / PASSED_FILE) as temporary:
            shutil.copyfile(there / PASSED_FILE, temporary)


def file_sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file under ``folder``, by relative path, without the manifest itself."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE)
    return {str(p.relative_to(folder)): p.stat().st_size for p in files}


def prune(root: Path, keep_last: int, keep_every: int = 0, ends: Collection[int] = ()) -> list[str]:
    """Delete committed checkpoints but the newest ``keep_last`` (0: all) and every ``keep_every`` steps (0: none).

    ``ends``: steps after which the model has grown. Their checkpoints, of which the next stages were made, stay too.

    The checkpoint that ``latest`` names is never deleted. Later ones do not count, and stay until the run reaches
    their steps again: they are damaged, or were abandoned by a rollback.
    """
    current = latest_tag(root)
    if keep_last <= 0 or current is None:
        return []
    tags = [tag for tag in finished_tags(root) if step_of(tag) <= step_of(current)]
    doomed = [
        tag
        for tag in tags[:-keep_last]
        if tag != current and step_of(tag) not in ends and not (keep_every and step_of(tag) % keep_every == 0)
    ]
    for tag in doomed:
        remove(root / tag)
    return doomed


def remove(folder: Path) -> None:
    """Delete a checkpoint. It loses its name first, so that an interrupted deletion is a leftover, not a checkpoint."""
    doomed = folder.with_name(f"{folder.name}.removed{TEMPORARY_SUFFIX}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(root: Path) -> list[str]:
    """Delete what killed saves, deletions and conversions have left; returns the names.

    A conversion of another run that starts from a checkpoint here is going on, and stays.
    """
    for lease in root.glob(f"global_step*.{LEASE_FILE}"):
        if holder_of(lease) is None:
            lease.unlink(missing_ok=True)
    leftovers = sorted(root.glob(f"global_step*{TEMPORARY_SUFFIX}"))
    leftovers = [folder for folder in leftovers if not beside(folder.with_suffix("")).exists()]
    for folder in leftovers:
        shutil.rmtree(folder, ignore_errors=True)
    for pointer in root.glob(f"{LATEST_FILE}*{TEMPORARY_SUFFIX}"):
        pointer.unlink(missing_ok=True)
    return [folder.name for folder in leftovers]
